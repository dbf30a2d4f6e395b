"""The names that people give contexts, found in the ids that stores give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from kvstream.testbed.errors import SpecError

_MADE: Final = re.compile(r"((?P<context>.+)-[^-]+)-[0-9a-f]{12}")
"""`docs-kvstream-1a2b3c4d5e6f`: the context's own name, its codec, and what else the encoding depends on."""
_SHOWN: Final = 8


def names_of(identifier: str) -> tuple[str, ...]:
    """What a context may be called: its id, and `docs` or `docs-kvstream` for `docs-kvstream-1a2b3c4d5e6f`."""
    made = _MADE.fullmatch(identifier)
    return (identifier,) if made is None else (identifier, made[1], made["context"])


def find_id(name: str, identifiers: Sequence[str]) -> str:
    """The id of the only context with this name. Raises SpecError listing the contexts, if there are none or more."""
    if name in identifiers:
        return name
    found = [identifier for identifier in identifiers if name in names_of(identifier)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(f"{len(found)} contexts are called {name!r}; give one of {_list(found)}")
    raise SpecError(f"no context {name[:140]!r} in this store; it has {_list(identifiers) or 'none'}")


def shortest_name(identifier: str, identifiers: Sequence[str]) -> str:
    """The shortest that finds a context among others."""
    others = {name for other in identifiers if other != identifier for name in names_of(other)}
    return min((name for name in names_of(identifier) if name == identifier or name not in others), key=len)


def _list(identifiers: Sequence[str]) -> str:
    more = len(identifiers) - _SHOWN
    return ", ".join(sorted(identifiers)[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
