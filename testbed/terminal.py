"""Text on standard output and error, as these may be: closed, narrow, or without Unicode."""

from __future__ import annotations

import codecs
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Final, TextIO

PLAIN: Final = {
    "–": "-", "—": "-", "−": "-", "×": "x", "≥": ">=", "≤": "<=", "≈": "~", "→": "->", "←": "<-", "…": "...",
    "·": ".", "•": "*", "░": ".", "▏": "|", "│": "|", "┤": "|", "─": "-", "✓": "+", "✗": "x", "±": "+-", "µ": "u",
    "†": "^", "▁": "_", "▂": ".", "▃": ":", "▄": "-", "▅": "=", "▆": "+", "▇": "*", "█": "#",
    "\u2009": " ", "\u202f": " ", "\xa0": " ",
}  # fmt: skip
"""What to print where the output has no such character; anything else becomes a question mark."""


def prepare() -> None:
    """Make printing safe. A closed stream swallows what is printed to it."""
    codecs.register_error("kvstream.plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            encoding = "ascii" if _says_no_unicode() else None
            stream.reconfigure(encoding=encoding, errors="kvstream.plain")


def _says_no_unicode() -> bool:
    """Whether the locale is one without Unicode by name. Python writes UTF-8 there all the same, which such a terminal
    cannot show; where no locale is set at all, terminals mostly can."""
    named = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "")
    return named in ("C", "POSIX") and "PYTHONIOENCODING" not in os.environ


def columns(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that a stream (default: standard output) is; None where it is none."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def say(text: str, *, error: bool = False) -> None:
    """Print prose; on a terminal no word is cut."""
    stream = sys.stderr if error else sys.stdout
    width = columns(stream)
    print(text if width is None else wrapped(text, width), file=stream, flush=True)


def wrapped(text: str, width: int) -> str:
    """The text with long lines broken between words, the rest indented as the line's last column is, if it has some."""
    return "\n".join(_line(line, width) for line in text.split("\n"))


def _line(line: str, width: int) -> str:
    plain = _ESCAPE.sub("", line)
    if len(plain) <= width:
        return line
    starts = [match.end() for match in _COLUMN.finditer(plain)]
    indent = starts[-1] if starts and starts[-1] <= width // 2 else len(plain) - len(plain.lstrip())
    whole = textwrap.fill(_UNIT.sub("\xa0", plain[indent:]), max(width, indent + 20), initial_indent=plain[:indent],
                          subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)  # fmt: skip
    coloured_to = max((match.end() for match in _ESCAPE.finditer(line)), default=0)  # a mark at the beginning
    return line[:coloured_to] + whole[coloured_to - (len(line) - len(plain)) :].replace("\xa0", " ")


_UNIT: Final = re.compile(r"(?<=\d) (?=%|[kMG]?bit|[kMG]?B\b|m?s\b|nats)")
"""Between a number and its unit."""
_ESCAPE: Final = re.compile(r"\033\[\d+m")
_COLUMN: Final = re.compile(r"\S {2,}(?=\S)")


def aligned(rows: Sequence[Sequence[str]], heads: int = 1, width: int | None = None) -> list[str]:
    """Lines of aligned cells, the first `heads` columns to the left, the others to the right. Where they are wider than
    `width`, the others follow in parts, each with the first columns before it."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = (width or sum(sizes) + GAP * len(sizes)) - sum(size + GAP for size in sizes[:heads])
    parts: list[list[int]] = [[]]
    for column in range(heads, len(sizes)):
        if parts[-1] and sum(sizes[one] + GAP for one in [*parts[-1], column]) - GAP > room:
            parts.append([])
        parts[-1].append(column)
    lines: list[str] = []
    for part in parts:
        lines += [""] if lines else []
        for row in rows:
            cells = [row[column].ljust(sizes[column]) for column in range(heads)]
            cells += [row[column].rjust(sizes[column]) for column in part]
            lines.append((" " * GAP).join(cells).rstrip())
    return lines


GAP: Final = 2
"""Spaces between columns."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


def coloured(text: str, colour: int) -> str:
    """The text in a colour (GREEN, RED) on a terminal that has some; plain in a pipe, and where NO_COLOR says so
    (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[{colour}m{text}\033[0m"


GREEN: Final = 32
RED: Final = 31


def many(count: int, noun: str) -> str:
    """`1 unit`, `9 units`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
