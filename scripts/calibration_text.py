"""Choose the text that codecs are calibrated and judged on: python scripts/calibration_text.py .corpus

From the corpus of the bundled models (see corpus.py), only files of CPython 3.11's library and documentation (PSF-2.0):
`fit.txt.xz` from the training split for profiles, `check.txt.xz` from the held-out split for measuring distortion.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "testbed" / "calibration"
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
    return b"\0".join(chosen)


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
