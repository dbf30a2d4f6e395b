"""One grammar for everything pluggable: `name,key=value,...`.

`mpc,horizon=5`, `./mine.py:MyPolicy,gain=2`, `cachegen,coder=ac`, `delay=20ms,loss=0.1%,queue=50ms`: a name (not for
links), then settings. Quantities carry units (`20ms`, `100Mbps`, `0.1%`, `64KiB`) and become SI floats. The settings
of a policy or a link are the fields of a dataclass, so their names, types and units come from there: a field that ends
in `_s`, `_bytes` or `_bps`, or whose type says so (`traces.units.Fraction`), takes no other unit.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from testbed.errors import SpecError
from traces.errors import TraceError
from traces.units import Dimension, parse_quantity

T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """A parsed spec: the name and the settings as written."""

    name: str
    settings: Mapping[str, str]

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


def parse(text: str, what: str = "spec") -> Spec:
    """`name,key=value,...` to a Spec. Raises SpecError for anything else."""
    name, _, rest = text.strip().partition(",")
    if not name or "=" in name:
        raise SpecError(f"{what} {text!r}: begin with a name, as in 'name,key=value'")
    return Spec(name, parse_settings(rest, what) if rest else {})


def parse_settings(text: str, what: str = "settings") -> dict[str, str]:
    """`key=value,...` to a dict. Raises SpecError for an empty or doubled key."""
    settings: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise SpecError(f"{what} {text!r}: {part!r} is not 'key=value'")
        if key in settings:
            raise SpecError(f"{what} {text!r}: {key!r} is given twice")
        settings[key] = value
    return settings


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
            raise SpecError(f"{what} has no setting {key!r}; it has {', '.join(fields) or 'none'}")
        name, found = _first_that_fits(value, names, hints, f"{what}: {key}")
        if name in values:
            raise SpecError(f"{what}: {name} is given twice")
        values[name] = found
    return cls(**values)


def _unit(name: str) -> Dimension | None:
    """What a field of this name is measured in; None where the name does not say."""
    stem, _, unit = name.rpartition("_")
    return _UNITS.get(unit) if stem else None


_UNITS: dict[str, Dimension] = {"s": "time", "bytes": "size", "bps": "rate"}


def _first_that_fits(
    value: str | int | float | bool, names: Sequence[str], hints: Mapping[str, Any], what: str
) -> tuple[str, Any]:
    """The first of the fields that can take the value, and the value as it takes it."""
    problem: SpecError | None = None
    for name in names:
        try:
            return name, coerce(value, hints[name], what, _unit(name))
        except SpecError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def coerce(value: str | int | float | bool, hint: Any, what: str, dimension: Dimension | None = None) -> Any:
    """`value` as `hint` says: float (with unit), int, bool, str, a Literal, or a union of these tried in order.

    With a dimension, or one in the hint (`Annotated[float, "fraction"]`), a number has its unit or none.
    """
    origin = typing.get_origin(hint)
    if origin is Annotated:
        own = hint.__metadata__[0]  # which may be anything, in a policy of someone else's
        return coerce(value, hint.__origin__, what, own if own in typing.get_args(Dimension) else dimension)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value == "none" and len(options) < len(typing.get_args(hint)):
            return None
        # a text fits every str: try what is narrower first
        problem: SpecError | None = None
        for option in sorted(options, key=lambda option: option is str):
            try:
                return coerce(value, option, what, dimension)
            except SpecError as error:
                problem = problem or error
        raise problem or SpecError(f"{what}={value!r} cannot be read")
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise SpecError(f"{what}={value!r}; use one of {', '.join(map(str, allowed))}")
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
            raise SpecError(f"{what}={value!r}; use on or off")
        return words[str(value).lower()]
    if hint in (int, float):
        try:
            number = float(value) if isinstance(value, int | float) else parse_quantity(value, dimension)
        except TraceError as error:
            raise SpecError(f"{what}: {error}") from error
        if hint is int:
            if number != int(number):
                raise SpecError(f"{what}={value!r} is not a whole number")
            return int(number)
        return number
    return str(value)
