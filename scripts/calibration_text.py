"""Choose the text that codecs are calibrated and judged on: python scripts/calibration_text.py .corpus

From the corpus of the bundled models (see corpus.py), only files of CPython 3.11's library and documentation (PSF-2.0):
`fit.txt.xz` from the training split for profiles, `check.txt.xz` from the held-out split for measuring distortion. The
contexts that come with kvstream take their text from the same split: documents that share a passage with one are left
out, so that a codec is judged on other text than policies are.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "testbed" / "calibration"
CONTEXTS = OUT.parent / "contexts"
PASSAGE_BYTES = 100
SHORTEST = 3_000
FIT_BYTES, CHECK_BYTES = 480_000, 160_000


def choose(corpus: Path, split: str, python_bytes: int, longest: int, wanted: int) -> bytes:
    """ASCII documents, evenly spaced over the first `python_bytes` of a split, `wanted` bytes in all."""
    with lzma.open(corpus / f"{split}.xz") as file:
        documents = file.read(python_bytes).split(b"\0")[:-1]
    usable = [d for d in documents if d.isascii() and SHORTEST <= len(d) <= longest]
    stride = max(1, int(len(usable) / (wanted / (sum(map(len, usable)) / len(usable)))))
    chosen = usable[::stride]
    while sum(map(len, chosen)) > wanted * 1.1:
        chosen.pop()
    contexts = [json.loads(file.read_text())["text"].encode() for file in sorted(CONTEXTS.glob("*.json"))]
    return b"\0".join(d for d in chosen if not any(shares_passage(d, text) for text in contexts))


def shares_passage(document: bytes, text: bytes) -> bool:
    """Whether `PASSAGE_BYTES` of the text, key-value lines apart, stand in the document. Passages begin at lines."""
    starts = [0, *(at + 1 for at, byte in enumerate(text) if byte == 0x0A)]
    passages = (text[start : start + PASSAGE_BYTES] for start in starts)
    return any(len(p) == PASSAGE_BYTES and b": REGISTER is <" not in p and p in document for p in passages)


def main() -> None:
    corpus = Path(sys.argv[1])
    OUT.mkdir(exist_ok=True)
    # The two PSF sources come first in either split; sources.json gives their sizes.
    for name, split, python_bytes, longest, wanted in (
        ("fit", "train", 11_010_326 + 10_659_624, 16_000, FIT_BYTES),
        ("check", "heldout", 176_354 + 331_970, 40_000, CHECK_BYTES),
    ):
        text = choose(corpus, split, python_bytes, longest, wanted)
        (OUT / f"{name}.txt.xz").write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        print(name, len(text), "bytes", text.count(b"\0") + 1, "documents")


if __name__ == "__main__":
    main()
