"""The text of a trace file, a block at a time: any size, plain or gzipped, UTF-8, UTF-16 or Latin-1, any line ends.

Files come from anywhere. What is read is bounded before it is taken, and nothing is held that a reader does not keep:
every pass opens the file again.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from kvstream.traces.errors import TraceError

MAX_FILE_BYTES = 4 * 2**30
"""Of a file, also once unpacked. Only arrays of numbers are kept of it."""
MAX_WHOLE_BYTES = 256 * 2**20
"""Of JSON, which is read whole, and of one line of anything else."""
BLOCK_BYTES = 2**20
# digits can be matched in one way only: else a long row of them takes quadratic time
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_SEPARATOR = re.compile(r"[\s,;]+")
_ARCHIVES = {
    b"PK\3\4": "a zip",
    b"\xfd7zXZ\0": "an xz",
    b"BZh": "a bzip2",
    b"\x28\xb5\x2f\xfd": "a zstd",
    b"7z\xbc": "a 7z",
}
_CONTROL = bytes({*range(32), 127} - set(b"\t\n\r\v\f"))


class Text:
    """A file's text: `source` is its name (not its path), `sha256` the hash of its bytes as they are on disk."""

    def __init__(self, source: str, opened: Callable[[], IO[bytes]], packed: bool = False) -> None:
        """`opened` gives the file from its start; `packed` says that it is gzipped.

        Raises TraceError when it cannot be read, is too large or empty.
        """
        self.source = source
        self._opened = opened
        self._packed = packed
        self.chosen = ""
        """How its format was chosen: `named` or `recognised`."""
        self.known: dict[str, Any] = {}
        """What was found out about the whole file, so that it is found out once."""
        digest = hashlib.sha256()
        self.size = 0
        """Bytes on disk."""
        for block in self._raw(packed=False):
            digest.update(block)
            self.size += len(block)
        self.sha256 = digest.hexdigest()

    @classmethod
    def of(cls, data: bytes, source: str) -> Text:
        """From bytes. Raises TraceError."""
        return cls(source, lambda: io.BytesIO(data), data[:2] == b"\x1f\x8b")

    @classmethod
    def read(cls, path: Path) -> Text:
        """From a file. Raises TraceError."""
        try:
            with path.open("rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
        except OSError as error:
            raise TraceError(f"{path}: cannot read this trace file ({error.strerror or error})") from None
        return cls(path.name, lambda: path.open("rb"), packed)

    # ---- bytes and lines

    def blocks(self) -> Iterator[bytes]:
        """Whole lines, each ended by `\\n`, as UTF-8 (Latin-1 where they are not), some megabytes at a time."""
        rest: list[bytes] = []
        waiting = 0
        for block in self._decoded():
            cut = block.rfind(b"\n") + 1
            if cut == 0:
                rest.append(block)
                waiting += len(block)
                if waiting > MAX_WHOLE_BYTES:
                    raise TraceError(f"{self.source}: a line of more than {MAX_WHOLE_BYTES} bytes; this is no trace")
                continue
            yield b"".join([*rest, block[:cut]])
            rest, waiting = [block[cut:]], len(block) - cut
        if last := b"".join(rest):
            yield last + b"\n"

    def lines(self, start: int = 1) -> Iterator[tuple[int, str]]:
        """(line number from 1, line), from line `start`."""
        number = 0
        for block in self.blocks():
            for line in self.decoded(block).split("\n")[:-1]:
                number += 1
                if number >= start:
                    yield number, line

    def rows(self, start: int = 1, *, comments: bool = False) -> Iterator[tuple[int, str]]:
        """(line number, stripped line) of lines that are neither blank nor (without `comments`) begin with `#`."""
        for number, line in self.lines(start):
            stripped = line.strip()
            if stripped and (comments or not stripped.startswith("#")):
                yield number, stripped

    @cached_property
    def first(self) -> tuple[int, str]:
        """The first row: (line number, stripped line). Raises TraceError where there is none."""
        found = next(self.rows(), None)
        if found is None:
            what = "nothing but comments" if next(self.rows(comments=True), None) else "empty"
            raise TraceError(f"{self.source}: {what}; a trace has at least one row")
        return found

    @cached_property
    def is_json(self) -> bool:
        return self.first[1][0] in "[{"

    def whole(self) -> str:
        """All of it, for JSON. Raises TraceError where that is too large."""
        parts, size = [], 0
        for block in self.blocks():
            parts.append(block)
            size += len(block)
            if size > MAX_WHOLE_BYTES:
                raise TraceError(
                    f"{self.source}: more than {MAX_WHOLE_BYTES} bytes of JSON; write it as CSV, which is read in parts"
                )
        return self.decoded(b"".join(parts))

    def _decoded(self) -> Iterator[bytes]:
        """The content as UTF-8 bytes (or Latin-1) with `\\n` as the only line end and without a byte order mark."""
        decoder = None
        begun = ended = False
        for block in self._raw(self._packed):
            if not begun:
                begun = True
                for magic, what in _ARCHIVES.items():
                    if block.startswith(magic):
                        raise TraceError(f"{self.source}: {what} archive; unpack it first (only .gz is read packed)")
                if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    decoder = codecs.getincrementaldecoder("utf-16")()
                elif block.startswith(codecs.BOM_UTF8):
                    block = block[3:]
            if decoder is not None:
                try:
                    block = decoder.decode(block).encode()
                except UnicodeError:
                    raise TraceError(f"{self.source}: not text (damaged UTF-16); traces are text files") from None
            if ended and block.startswith(b"\n"):  # the end of the block before was the first half of a line end
                block = block[1:]
            ended = block.endswith(b"\r")
            if b"\r" in block:
                block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if b"\0" in block:
                raise TraceError(f"{self.source}: not text (it holds zero bytes); traces are text files")
            yield block
        if decoder is not None:
            try:
                decoder.decode(b"", final=True)
            except UnicodeError:
                raise TraceError(f"{self.source}: not text (damaged UTF-16); traces are text files") from None

    def _raw(self, packed: bool) -> Iterator[bytes]:
        size = 0
        try:
            with self._opened() as file, gzip.open(file) if packed else file as content:
                while block := content.read(BLOCK_BYTES):
                    size += len(block)
                    if size > MAX_FILE_BYTES:
                        raise TraceError(
                            f"{self.source}: more than {MAX_FILE_BYTES} bytes; a trace file has at most "
                            f"{MAX_FILE_BYTES}: cut it into several"
                        )
                    yield bytes(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(f"{self.source}: damaged gzip ({error}); unpack it yourself, or fetch it again") from None
        except OSError as error:
            raise TraceError(f"{self.source}: cannot read this trace file ({error.strerror or error})") from None

    def decoded(self, block: bytes) -> str:
        """Text in UTF-8 or, as names beside the numbers may be, Latin-1. Raises TraceError for what is no text."""
        try:
            return block.decode()
        except UnicodeDecodeError as error:
            if block[: 1 << 16].translate(None, _CONTROL) != block[: 1 << 16]:
                problem = f"not text (byte {error.start} is not UTF-8)"
                raise TraceError(f"{self.source}: {problem}; traces are text files") from None
            return block.decode("latin-1")

    # ---- errors and numbers

    def error(self, line: int, problem: str) -> TraceError:
        """A TraceError that says where."""
        return TraceError(f"{self.source}:{line}: {problem}")

    def number(self, line: int, field: str, what: str, low: float = -math.inf, high: float = math.inf) -> float:
        """The field as a finite number in [low, high]; raises TraceError naming file, line and field."""
        if not is_number(field.strip()):
            raise self.error(line, f"{what} is {field.strip()[:40]!r}; expected a number")
        value = float(field)
        if not (math.isfinite(value) and low <= value <= high):
            bound = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            wanted = f"a finite number {bound}" if math.isfinite(low) else "a finite number"
            raise self.error(line, f"{what} is {field.strip()[:40]}; expected {wanted}")
        return value


def split(row: str) -> list[str]:
    """Fields between spaces, tabs, commas or semicolons."""
    return _SEPARATOR.split(row.strip())


def is_number(field: str) -> bool:
    """Whether a field has the form of a number."""
    return _NUMBER.fullmatch(field) is not None
