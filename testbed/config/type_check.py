"""Whether values that came out of a file have the types that they should, told in one line.

The types are annotations: those of a dataclass's fields, or a table of names and types beside the reader.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, Final, Literal, Union, get_args, get_origin

from kvstream.testbed.errors import SpecError

_WORDS: Final[Mapping[Any, tuple[str, str]]] = {
    bool: ("true or false", "values of true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    list: ("a list", "lists"),
    dict: ("a table", "tables"),
    type(None): ("nothing", "nothing"),
    Any: ("anything", "values"),
}
_SHOWN: Final = 60


def check(values: Mapping[str, object], hints: Mapping[str, Any]) -> None:
    """Raise SpecError for the first of `values` that is not what `hints` says of its name."""
    for name, hint in hints.items():
        if name in values and not fits(values[name], hint):
            shown = repr(values[name])
            shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
            raise SpecError(f"{name} is {shown}; give {words(hint)}")


def fits(value: object, hint: Any) -> bool:
    """Whether a value out of TOML or JSON is what an annotation says: a list will do for a tuple, 1 for a float."""
    if type(hint) is type and hint not in (int, float):
        return isinstance(value, hint)
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(key, inner[0]) and fits(value[key], inner[1]) for key in value)
    whole = isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63  # as TOML says
    return whole or (hint is float and isinstance(value, float) and math.isfinite(value))


def words(hint: Any, several: bool = False) -> str:
    """An annotation for people: `a list of numbers`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(words(option, several) for option in inner)
    if origin in (list, tuple):
        return f"{_WORDS[list][several]} of {words(inner[0], several=True)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{_WORDS[dict][several]} of {words(inner[1], several=True)}"
    return _WORDS[hint][several]
