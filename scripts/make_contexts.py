"""Write the contexts shipped with kvstream: key-value lines in held-out text of CPython's library and documentation.

    python scripts/make_contexts.py .corpus

Each context is `TOKENS` bytes. The text comes from files that the bundled model was not trained on; only CPython's
are used, so that one licence (PSF-2.0) covers what is shipped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import corpus

from kvstream.testbed.workloads.contexts import BUNDLED_CONTEXTS, make_context

TOKENS = 4_096
STDLIB, DOCS = corpus.SOURCES[:2]
LICENCE = "text from {}, PSF-2.0, (c) Python Software Foundation; key-value lines added by kvstream"

# name: which source, what its file names begin with after the folder, number of lines, seed
CONTEXTS: dict[str, tuple[corpus.Source, tuple[str, ...], int, int]] = {
    "docs": (DOCS, ("library/stdtypes",), 24, 1),
    "prose": (DOCS, ("tutorial/",), 20, 2),
    "code": (STDLIB, ("",), 24, 3),
    "asyncio": (DOCS, ("library/asyncio", "library/graphlib", "library/stat"), 28, 4),
    "tkinter": (DOCS, ("library/tkinter",), 32, 5),
    "tests": (STDLIB, ("test/",), 40, 6),
}


def heldout_texts(source: corpus.Source, beginnings: tuple[str, ...], downloads: Path) -> list[bytes]:
    """The held-out files of a source whose names begin with one of `beginnings`, without non-ASCII characters."""
    texts = []
    for name, content in corpus.files_of(source, downloads):
        if corpus.is_heldout(source, name) and name.rpartition("_sources/")[2].startswith(beginnings):
            document = corpus.clean(name, content)
            if document is not None:
                texts.append(document.decode().encode("ascii", "ignore"))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("corpus", type=Path, help="the folder that corpus.py wrote")
    downloads = parser.parse_args().corpus / "downloads"
    BUNDLED_CONTEXTS.mkdir(exist_ok=True)
    for name, (source, beginnings, n_lines, seed) in CONTEXTS.items():
        texts = heldout_texts(source, beginnings, downloads)
        context = make_context(seed, TOKENS, texts, n_lines, name)
        origin = LICENCE.format(f"{source.name} {source.version}")
        (BUNDLED_CONTEXTS / f"{name}.json").write_text(replace(context, source=origin).to_json(), encoding="utf-8")
        print(f"{name}: {len(texts)} texts, {len(context.text)} tokens, {len(context.questions)} questions")


if __name__ == "__main__":
    main()
