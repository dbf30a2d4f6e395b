"""Assemble the text that the bundled models are trained on.

    python scripts/corpus.py [--installed] .corpus

Every source is a pinned release under a permissive licence: the standard library of the running CPython, its
documentation (Debian's `python3.11-doc`, the reStructuredText sources), and Python packages taken as source
archives or wheels with pip. Kept are `.py`, `.rst`, `.txt` and `.md` files that read like text or code; dropped
are duplicates, generated tables, minified and non-UTF-8 files, and leading licence comments, which repeat. Of a large
source only a sample of its files is kept. `--installed` takes the packages of the running Python instead, for a machine
without a network; the standard library, from which the calibration's texts are, is left out.

Written to the folder: `train.xz` and `heldout.xz` (UTF-8 documents, each followed by one zero byte; the split is
by file, decided by a hash of the file's name) and `sources.json` (name, version, licence, bytes of each source,
SHA-256 of both texts).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HELDOUT_PERCENT = 2
LARGEST_SOURCE_BYTES = 11_000_000  # of a larger source a sample of files is kept, so that no package dominates
SUFFIXES = (".py", ".rst", ".txt", ".md")
SMALLEST_BYTES, LARGEST_BYTES = 400, 400_000
SKIPPED_PARTS = ("/locale/", "/locales/", "/_vendor/", "/node_modules/", "/site-packages/", "/lib2to3/tests/data/")
SKIPPED_NAMES = ("license", "copying", "notice", "authors", "record", "top_level", "requirements", "sources.txt")


@dataclass(frozen=True)
class Source:
    """One pinned release. `kind` says where pip finds text in it: `sdist`, `wheel`, or `stdlib` and `debian`; or that
    it is `installed`."""

    name: str
    version: str
    licence: str
    kind: str


SOURCES = (
    Source("CPython standard library", platform.python_version(), "PSF-2.0", "stdlib"),
    Source("python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0", "debian"),
    Source("django", "5.2.19", "BSD-3-Clause", "sdist"),
    Source("sqlalchemy", "2.1.9", "MIT", "sdist"),
    Source("sympy", "1.14.0", "BSD-3-Clause", "sdist"),
    Source("sphinx", "9.0.4", "BSD-2-Clause", "sdist"),
    Source("networkx", "3.6.1", "BSD-3-Clause", "sdist"),
    Source("twisted", "26.10.0", "MIT", "sdist"),
    Source("celery", "5.7.0", "BSD-3-Clause", "sdist"),
    Source("scrapy", "2.19.0", "BSD-3-Clause", "sdist"),
    Source("flask", "3.1.3", "BSD-3-Clause", "sdist"),
    Source("jinja2", "3.1.6", "BSD-3-Clause", "sdist"),
    Source("tornado", "6.6.1", "Apache-2.0", "sdist"),
    Source("ipython", "9.18.1", "BSD-3-Clause", "sdist"),
    Source("nova", "34.0.0", "Apache-2.0", "sdist"),
    Source("numpy", "2.4.6", "BSD-3-Clause", "wheel"),
    Source("scipy", "1.17.1", "BSD-3-Clause", "wheel"),
    Source("pandas", "3.1.1", "BSD-3-Clause", "wheel"),
    Source("matplotlib", "3.11.2", "PSF-based", "wheel"),
    Source("scikit-learn", "1.9.1", "BSD-3-Clause", "wheel"),
    Source("scikit-image", "0.26.0", "BSD-3-Clause", "wheel"),
    Source("transformers", "5.23.0", "Apache-2.0", "wheel"),
    Source("bokeh", "3.9.2", "BSD-3-Clause", "wheel"),
    Source("astropy", "8.0.2", "BSD-3-Clause", "wheel"),
    Source("jax", "0.10.2", "Apache-2.0", "wheel"),
    Source("xarray", "2026.9.0", "Apache-2.0", "wheel"),
    Source("dask", "2026.8.0", "BSD-3-Clause", "wheel"),
    Source("nltk", "3.10.4", "Apache-2.0", "wheel"),
    Source("apache-airflow-core", "3.3.2", "Apache-2.0", "wheel"),
)


def fetch(source: Source, folder: Path) -> Path:
    """Download one pinned release with its own client (pip or apt-get) and return the archive's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "debian":
        if not list(folder.glob("*.deb")):
            command = ["apt-get", "download", f"{source.name}={source.version}"]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return next(folder.glob("*.deb"))
    if not list(folder.iterdir()):
        form = "--no-binary" if source.kind == "sdist" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", form, ":all:"]
        subprocess.run([*command, "-d", str(folder), f"{source.name}=={source.version}"], check=True)
    return next(folder.iterdir())


def files_of(source: Source, downloads: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the source, content) of every candidate file, in a stable order."""
    if source.kind == "stdlib":
        yield from _tree(Path(sysconfig.get_paths()["stdlib"]))
        return
    if source.kind == "installed":
        for file in sorted(metadata.files(source.name) or [], key=str):
            path = Path(str(file.locate()))
            if file.name.endswith(SUFFIXES) and path.is_file():
                yield str(file), path.read_bytes()
        return
    archive = fetch(source, downloads / source.name)
    if source.kind == "debian":
        with tempfile.TemporaryDirectory() as unpacked:
            subprocess.run(["dpkg", "-x", str(archive), unpacked], check=True)
            yield from _tree(Path(unpacked))
    elif source.kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(SUFFIXES):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(archive) as sdist:
            members = {member.name: member for member in sdist if member.isfile()}
            for name in sorted(members):
                handle = sdist.extractfile(members[name]) if name.endswith(SUFFIXES) else None
                if handle is not None:
                    yield name, handle.read()


def _tree(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name.endswith(SUFFIXES):
            yield str(path.relative_to(root)), path.read_bytes()


def clean(name: str, content: bytes) -> bytes | None:
    """The document as it is trained on, or None if it is not prose or hand-written code."""
    lowered = "/" + name.lower()
    if any(part in lowered for part in SKIPPED_PARTS):
        return None
    if lowered.rsplit("/", 1)[1].startswith(SKIPPED_NAMES):
        return None
    if not SMALLEST_BYTES <= len(content) <= LARGEST_BYTES or b"\0" in content:
        return None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").expandtabs(8)
    head = re.match(r"(?:[ ]*#[^\n]*\n|\s*\n)+", text)
    if head and re.search(r"licen[sc]e|copyright", head.group(), re.IGNORECASE):
        text = text[head.end() :]
    text = re.sub(r"[ ]+\n", "\n", text).strip("\n") + "\n"
    lines = text.splitlines()
    if len(text) < SMALLEST_BYTES or max(map(len, lines)) > 1_000 or len(text) / len(lines) > 160:
        return None
    digits = sum(character.isdigit() for character in text) / len(text)
    letters = sum(character.isalpha() for character in text) / len(text)
    ascii_share = sum(character.isascii() for character in text) / len(text)
    if digits > 0.15 or letters < 0.4 or ascii_share < 0.95:
        return None
    return text.encode()


def is_heldout(source: Source, name: str) -> bool:
    """Whether a file belongs to the held-out split; depends on nothing but its name, so runs agree."""
    return _name_hash(source, name) % 100 < HELDOUT_PERCENT


def _name_hash(source: Source, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{source.name}/{name}".encode()).digest()[:8], "big")


def installed() -> tuple[Source, ...]:
    """Every package of the running Python, once."""
    found = {}
    for one in metadata.distributions():
        licence = one.metadata.get("License-Expression") or one.metadata.get("License") or "see the package"
        found[one.name] = Source(one.name, one.version, licence.splitlines()[0][:60], "installed")
    return tuple(found[name] for name in sorted(found))


def build(folder: Path, sources: tuple[Source, ...] = SOURCES, preset: int = 6) -> dict:
    """Write `train.xz`, `heldout.xz` and `sources.json` into `folder` and return the last one's content."""
    seen: set[bytes] = set()
    parts: dict[str, list[bytes]] = {"train": [], "heldout": []}
    rows = []
    for source in sources:
        documents: dict[str, bytes] = {}
        for name, content in files_of(source, folder / "downloads"):
            document = clean(name, content)
            digest = hashlib.sha256(b"".join((document or b"").split())).digest()
            if document is not None and digest not in seen:
                seen.add(digest)
                documents[name] = document + b"\0"
        kept = {"train": 0, "heldout": 0}
        for name in sorted(documents, key=lambda name: _name_hash(source, name)):
            split = "heldout" if is_heldout(source, name) else "train"
            if kept["train"] < LARGEST_SOURCE_BYTES:
                parts[split].append(documents[name])
                kept[split] += len(documents[name])
        rows.append(
            {
                "name": source.name,
                "version": source.version,
                "licence": source.licence,
                "train_bytes": kept["train"],
                "heldout_bytes": kept["heldout"],
            }
        )
        print(f"{source.name:28} {source.version:18} {kept['train']:>11,} train {kept['heldout']:>9,} held out")
    report: dict = {"sources": rows}
    for split, chosen in parts.items():
        text = b"".join(chosen)
        packed = lzma.compress(text, preset=preset)
        (folder / f"{split}.xz").write_bytes(packed)
        report[split] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        print(f"{split}: {len(text):,} bytes, {len(packed):,} compressed")
    (folder / "sources.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def load(folder: Path, split: str) -> bytes:
    """The text of `train` or `heldout`: UTF-8 documents, each followed by one zero byte."""
    path = folder / f"{split}.xz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run python scripts/corpus.py {folder}")
    return lzma.decompress(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the corpus and the downloads go")
    parser.add_argument("--installed", action="store_true", help="take the packages of the running Python")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.installed:  # not to be kept: little time for compressing it
        build(options.folder, installed(), preset=0)
    else:
        build(options.folder)


if __name__ == "__main__":
    main()
