"""One grammar for everything pluggable: `name,key=value,...`.

`mpc,horizon=5`, `./mine.py:MyPolicy,gain=2`, `cachegen,coder=ac`, `delay=20ms,loss=0.1%,queue=50ms`: a name (not for
links), then settings; what holds a comma is quoted (`traces.grammar`). Quantities carry units (`20ms`, `100Mbps`,
`0.1%`, `64KiB`) and become SI floats. The settings of a policy or a link are the fields of a dataclass, so their names,
types and units come from there: a field that ends in `_s`, `_bytes` or `_bps`, or whose type says so
(`traces.units.Fraction`), takes no other unit, and only its full name (`delay_s`) takes a number without one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from kvstream.testbed.errors import SpecError
from kvstream.traces import grammar
from kvstream.traces.errors import TraceError
from kvstream.traces.nearest import nearest
from kvstream.traces.units import Dimension, parse_quantity

T = TypeVar("T")
MAX_TEXT = 1000
"""Characters of a spec: messages repeat it."""


@dataclass(frozen=True)
class Spec:
    """A parsed spec: the name and the settings as written."""

    name: str
    settings: Mapping[str, str]

    def __str__(self) -> str:
        return grammar.write(self.name, self.settings)


def parse(text: str, what: str = "spec") -> Spec:
    """`name,key=value,...` to a Spec. Raises SpecError for anything else."""
    if len(text) > MAX_TEXT:
        raise SpecError(f"{what} {text[:40]!r}... has {len(text)} characters, more than {MAX_TEXT}")
    try:
        name, settings = grammar.parse(text, _is_file)
    except TraceError as error:
        raise SpecError(f"{what} {grammar.shown(text)}: {error}") from None
    if not name or ("=" in name and not _is_file(name) and text.lstrip()[0] not in "\"'"):
        raise SpecError(f"{what} {grammar.shown(text)}: begin with a name, as in 'name,key=value'")
    return Spec(name, settings)


def _is_file(name: str) -> bool:
    """Whether a name, or what comes before its last colon (`./mine.py:MyPolicy`), is a file."""
    path, _, part = name.rpartition(":")
    try:
        return Path(name).is_file() or (part.isidentifier() and bool(path) and Path(path).is_file())
    except (OSError, ValueError):
        return False


def parse_settings(text: str, what: str = "settings") -> dict[str, str]:
    """`key=value,...` to a dict. Raises SpecError for an empty or doubled key."""
    try:
        return grammar.parse_settings(text)
    except TraceError as error:
        raise SpecError(f"{what} {grammar.shown(text)}: {error}") from None


def build(cls: type[T], settings: Mapping[str, str | int | float | bool], what: str) -> T:
    """An instance of dataclass `cls` from settings as written; each value becomes its field's type.

    A field whose name ends in a unit (`delay_s`, `queue_bytes`) may be written without it (`delay`); of several such
    fields the value's unit says which is meant (`queue=50ms`, `queue=64KiB`). Raises SpecError naming the settings
    there are.
    """
    if not dataclasses.is_dataclass(cls):
        if settings:
            raise SpecError(f"{what} takes no settings (it is not a dataclass); remove {', '.join(settings)}")
        return cls()
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        names = [key] if key in fields else [name for name in fields if name.rpartition("_")[0] == key and _unit(name)]
        if not names:
            raise SpecError(f"{what}: unknown setting {grammar.brief(key)}; {nearest(key, fields)}")
        name, found = _first_that_fits(value, names, hints, f"{what}: {key}", bare=key in fields)
        if name in values:
            raise SpecError(f"{what}: {name} is given twice")
        values[name] = found
    return cls(**values)


def _unit(name: str) -> Dimension | None:
    """What a field of this name is measured in; None where the name does not say."""
    stem, _, unit = name.rpartition("_")
    return _UNITS.get(unit) if stem else None


def has_unit(name: str) -> bool:
    """Whether a field's name says what it is measured in, so that it may be written without that."""
    return _unit(name) is not None


_UNITS: dict[str, Dimension] = {"s": "time", "bytes": "size", "bps": "rate"}


def _first_that_fits(
    value: str | int | float | bool, names: Sequence[str], hints: Mapping[str, Any], what: str, bare: bool
) -> tuple[str, Any]:
    """The first of the fields that can take the value, and the value as it takes it."""
    problem: SpecError | None = None
    for name in names:
        try:
            return name, coerce(value, hints[name], what, _unit(name), bare=bare)
        except SpecError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def coerce(
    value: str | int | float | bool, hint: Any, what: str, dimension: Dimension | None = None, *, bare: bool = False
) -> Any:
    """`value` as `hint` says: float (with unit), int, bool, str, a Literal, or a union of these tried in order.

    With a dimension, or one in the hint (`Annotated[float, "fraction"]`), a number has its unit; `bare` allows none.
    """
    origin = typing.get_origin(hint)
    if origin is Annotated:
        own = hint.__metadata__[0]  # which may be anything, in a policy of someone else's
        return coerce(value, hint.__origin__, what, own if own in typing.get_args(Dimension) else dimension, bare=bare)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value == "none" and len(options) < len(typing.get_args(hint)):
            return None
        # a text fits every str: try what is narrower first
        problem: SpecError | None = None
        for option in sorted(options, key=lambda option: option is str):
            try:
                return coerce(value, option, what, dimension, bare=bare)
            except SpecError as error:
                problem = problem or error
        raise problem or SpecError(f"{what}={grammar.brief(value)} cannot be read")
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise SpecError(f"{what}={grammar.brief(value)}; use one of {', '.join(map(str, allowed))}")
        return value
    if hint is bool:
        words = {
            "on": True,
            "true": True,
            "yes": True,
            "1": True,
            "off": False,
            "false": False,
            "no": False,
            "0": False,
        }
        if isinstance(value, bool):
            return value
        if str(value).lower() not in words:
            raise SpecError(f"{what}={grammar.brief(value)}; use on or off")
        return words[str(value).lower()]
    if hint in (int, float):
        try:
            number = float(value) if isinstance(value, int | float) else parse_quantity(value, dimension, bare=bare)
        except TraceError as error:
            raise SpecError(f"{what}: {error}") from error
        if hint is int:
            if number != int(number):
                raise SpecError(f"{what}={grammar.brief(value)} is not a whole number")
            return int(number)
        return number
    return str(value)
