"""Names and files of a store: ids from outside are checked before they become paths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import Manifest

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
EVALUATION = "evaluation"
"""The folder of what is never served."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def checked_id(context: str) -> str:
    """A context's id, or SpecError: letters, digits, dot, dash and underscore, at most 128, no leading dot."""
    if not ID.fullmatch(context):
        raise SpecError(f"{context[:140]!r} is not a context id: 1 to 128 letters, digits and ._-, the first no ._-")
    return context


def checked_sha256(digest: str) -> str:
    if not _SHA256.fullmatch(digest):
        raise SpecError(f"{digest[:80]!r} is not a SHA-256 in lower-case hexadecimal")
    return digest


def check_chunk(chunk: int, level: LevelOrText) -> None:
    """Raises SpecError for a chunk or level that no context can have."""
    if not (level == TEXT or (isinstance(level, int) and level >= 0)) or chunk < 0:
        raise SpecError(f"invalid chunk {chunk!r} or level {level!r}: both count from 0, or the level is 'text'")


def chunk_path(folder: Path, chunk: int, level: LevelOrText) -> Path:
    """File of one encoding in a context's folder; it need not exist. Raises SpecError."""
    check_chunk(chunk, level)
    return folder / "chunks" / str(chunk) / f"{level}.bin"


def check_chunks(folder: Path, manifest: Manifest, hashes: Mapping[str, str]) -> None:
    """Raises SpecError for a chunk that is missing, of another size or without a hash."""
    for key, size in encodings(manifest):
        chunk, _, level = key.partition("/")
        path = chunk_path(folder, int(chunk), level_of(level))
        if not path.is_file() or path.stat().st_size != size or key not in hashes:
            raise SpecError(f"context {manifest.context}: chunk {key} is missing or not of {size} bytes")


def encodings(manifest: Manifest) -> Iterator[tuple[str, int]]:
    """Every encoding of a context as (`{chunk}/{level}`, bytes)."""
    for index, chunk in enumerate(manifest.chunks):
        yield f"{index}/{TEXT}", chunk.text_bytes
        for level, size in enumerate(chunk.sizes_bytes):
            yield f"{index}/{level}", size


def level_of(text: str) -> LevelOrText:
    """A level as written in a URL or file name. Raises SpecError."""
    if text == TEXT:
        return TEXT
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise SpecError(f"{text[:40]!r} is not a level: give a number from 0, or 'text'")
    return int(text)
