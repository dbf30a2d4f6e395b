"""The grammar of everything that is named with settings: `name,key=value,...`.

Names and values with a comma are quoted, with `"` or `'`; a doubled quote stands for one: `"a,b.log",start=2s`,
`steady,then="./a,b.log"`. A quote matters only at the start of a name or a value, and `=` only in a setting. A file,
folder or pattern of files that exists needs no quotes, whatever its name: the longest beginning of the text, up to a
comma, that exists is the name.
"""

from __future__ import annotations

import glob
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path

from kvstream.traces.errors import TraceError

_QUOTED = re.compile(r'\s*(?:"((?:[^"]|"")*)"|\'((?:[^\']|\'\')*)\')\s*')
_PATTERN = re.compile(r"[*?\[]")
LONG, SHORT, BRIEF = 800, 200, 60
"""Characters of a quoted spec that is cut, what is left of it, and of a word that is quoted beside it."""


def shown(text: str) -> str:
    """As a message repeats it; cut where it is long, which characters that cannot be printed make it."""
    whole = repr(text)
    return whole if len(whole) <= LONG else f"{text[:SHORT]!r}..."


def plain(path: str) -> str:
    """A path as a message names it: as it is, quoted only where that is not one short line."""
    return path if path.isprintable() and len(path) <= LONG else shown(path)


def brief(word: object) -> str:
    """A word of a spec, or a value of a file, as a message repeats it."""
    if isinstance(word, str):
        return f"{word[:BRIEF]!r}..." if len(word) > BRIEF else repr(word)
    return reprlib.repr(word)[: 2 * BRIEF]


def exists(name: str) -> bool:
    """Whether a name is a file, a folder, or a pattern (`*`, `?`, `[...]`) that fits some."""
    try:
        return Path(name).exists() or (is_pattern(name) and next(glob.iglob(name, recursive=True), None) is not None)
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def is_file(name: str) -> bool:
    """Whether a name is a file; a name that no file can have is none."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def is_folder(name: str) -> bool:
    """Whether a name is a folder; a name that no folder can have is none."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def is_pattern(name: str) -> bool:
    return _PATTERN.search(name) is not None


def parse(text: str, exists: Callable[[str], bool] = exists) -> tuple[str, dict[str, str]]:
    """(name, settings as written) of `name,key=value,...`. Raises TraceError, whose message does not repeat `text`."""
    text = text.strip()
    if exists(text):
        return text, {}
    if quoted := _QUOTED.match(text):
        rest = text[quoted.end() :]
        if rest and not rest.startswith(","):
            raise TraceError(f"after the quoted name comes {brief(rest)}; expected a comma")
        return _content(quoted), parse_settings(rest[1:])
    commas = [match.start() for match in re.finditer(",", text)]
    end = next((at for at in reversed(commas) if exists(text[:at])), commas[0] if commas else len(text))
    return text[:end].strip(), parse_settings(text[end + 1 :])


def parse_settings(text: str) -> dict[str, str]:
    """Settings as written, quotes removed, of `key=value,...`. Raises TraceError for one without value, or doubled."""
    settings: dict[str, str] = {}
    while text.strip():
        key, equals, rest = text.partition("=")
        if "," not in key and (quoted := _QUOTED.match(rest)):
            value, rest = _content(quoted), rest[quoted.end() :]
            if rest and not rest.startswith(","):
                raise TraceError(f"after {brief(f'{key.strip()}={value}')} comes {brief(rest)}; expected a comma")
            text = rest[1:]
        else:
            part, _, text = text.partition(",")
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not key or not value:
                if not part.strip():
                    continue
                raise TraceError(f'{brief(part.strip())} is not key=value (a name with a comma is quoted: "a,b.log")')
        key = key.strip()
        if not key:
            raise TraceError(f"={brief(value)} has no name; settings are key=value")
        if key in settings:
            raise TraceError(f"{brief(key)} is given twice")
        settings[key] = value
    return settings


def write(name: str, settings: Mapping[str, str]) -> str:
    """The text that `parse` reads back."""
    return ",".join([quoted(name), *(f"{key}={quoted(value)}" for key, value in settings.items())])


def quoted(word: str) -> str:
    """A name or a value, in quotes where it needs them."""
    if word and "," not in word and word[0] not in "\"'" and word == word.strip():
        return word
    return '"' + word.replace('"', '""') + '"'


def _content(match: re.Match[str]) -> str:
    double, single = match.groups()
    return double.replace('""', '"') if double is not None else single.replace("''", "'")
