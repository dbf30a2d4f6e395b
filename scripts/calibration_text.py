"""Choose the texts for calibrating codecs and measuring their distortion (testbed/encoding/calibration):

    python scripts/calibration_text.py python .corpus
    python scripts/calibration_text.py language /var/lib/dpkg/info/debconf.templates
    python scripts/calibration_text.py prose GSUTIL /usr/share/common-licenses/CC0-1.0

`python`: from the corpus of the bundled models (see corpus.py), only files of CPython 3.11's library and documentation
(PSF-2.0), prose and code: `fit.txt.xz` from the training split for profiles, `check.txt.xz` from the held-out split for
measuring distortion. The contexts that come with kvstream take their text from the same split: documents that share a
passage with one are left out, so that a codec is judged on other text than policies are.

`language`: the translations of debconf's questions (Debian package debconf; BSD-2-clause, 1999-2010 Joey Hess and
others) into 60 languages: `fit-language.txt.xz`, and `check-language.txt.xz` with the languages of HELD_OUT.

`prose`: `check-prose.txt.xz`, English that is neither about Python nor documentation of a library: topics of gsutil's
help (PyPI package gsutil, folder gslib/addlhelp; Apache-2.0, Google Inc.) and the legal code of CC0 1.0 (CC0-1.0).

Random characters are drawn where they are needed (testbed/encoding/texts.py).
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "testbed" / "encoding" / "calibration"
CONTEXTS = ROOT / "testbed" / "workloads" / "data" / "contexts"
PASSAGE_BYTES = 100
SHORTEST = 3_000
FIT_BYTES, CHECK_BYTES = 480_000, 160_000
HELD_OUT = ("cs", "de", "es", "fr", "ja", "pt", "ru", "tr")
TOPICS = ("prod", "security", "naming", "metadata", "acls", "support")


def python(corpus: Path) -> None:
    # The two PSF sources come first in either split; sources.json gives their sizes.
    for name, split, python_bytes, longest, wanted in (
        ("fit", "train", 11_010_326 + 10_659_624, 16_000, FIT_BYTES),
        ("check", "heldout", 176_354 + 331_970, 40_000, CHECK_BYTES),
    ):
        write(name, choose(corpus, split, python_bytes, longest, wanted))


def choose(corpus: Path, split: str, python_bytes: int, longest: int, wanted: int) -> list[bytes]:
    """ASCII documents, evenly spaced over the first `python_bytes` of a split, `wanted` bytes in all."""
    with lzma.open(corpus / f"{split}.xz") as file:
        documents = file.read(python_bytes).split(b"\0")[:-1]
    usable = [d for d in documents if d.isascii() and SHORTEST <= len(d) <= longest]
    stride = max(1, int(len(usable) / (wanted / (sum(map(len, usable)) / len(usable)))))
    chosen = usable[::stride]
    while sum(map(len, chosen)) > wanted * 1.1:
        chosen.pop()
    contexts = [json.loads(file.read_text())["text"].encode() for file in sorted(CONTEXTS.glob("*.json"))]
    return [d for d in chosen if not any(shares_passage(d, text) for text in contexts)]


def shares_passage(document: bytes, text: bytes) -> bool:
    """Whether `PASSAGE_BYTES` of the text, key-value lines apart, stand in the document. Passages begin at lines."""
    starts = [0, *(at + 1 for at, byte in enumerate(text) if byte == 0x0A)]
    passages = (text[start : start + PASSAGE_BYTES] for start in starts)
    return any(len(p) == PASSAGE_BYTES and b": REGISTER is <" not in p and p in document for p in passages)


def language(templates: Path) -> None:
    """One document per language; English and what is in other encodings is left out."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    current = None
    for line in templates.read_text(encoding="utf-8").splitlines():
        if field := re.match(r"[A-Z]\w+(?:-([\w@]+)\.UTF-8)?:\s*(.*)", line):
            current, line = field[1], field[2]
        if current and line.strip():
            found[current].append("" if line.strip() == "." else line.strip())
    texts = {code: ("\n".join(lines) + "\n").encode() for code, lines in sorted(found.items())}
    write("fit-language", [text for code, text in texts.items() if code not in HELD_OUT and len(text) > 1_000])
    write("check-language", [texts[code] for code in HELD_OUT])


def prose(gsutil: Path, legal: Path) -> None:
    documents = [legal.read_bytes()]
    for topic in TOPICS:
        source = (gsutil / "gslib" / "addlhelp" / f"{topic}.py").read_text(encoding="utf-8")
        help_text = max(re.findall(r'"""(.*?)"""', source, flags=re.DOTALL), key=len)
        documents.append((re.sub(r"</?B>", "", help_text).strip() + "\n").encode())
    write("check-prose", documents)


def write(name: str, documents: list[bytes]) -> None:
    OUT.mkdir(exist_ok=True)
    packed = lzma.compress(b"\0".join(documents), preset=9 | lzma.PRESET_EXTREME)
    (OUT / f"{name}.txt.xz").write_bytes(packed)
    print(f"{name}: {len(documents)} documents, {sum(map(len, documents))} bytes, {len(packed)} compressed")


if __name__ == "__main__":
    {"python": python, "language": language, "prose": prose}[sys.argv[1]](*map(Path, sys.argv[2:]))
