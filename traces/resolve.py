"""Any text that names a trace, to the trace: `name,key=value,...`.

The name is a generator (`uniform`), a library trace (`steady`, `family/markov-003`), a file (`./log.csv`), or a
plug-in's generator (entry point `kvstream.traces`). The settings are the generator's (or, for a file, `format` and
`part`), and then transforms, applied in the order written:

    start=2s          begin so far into the trace            take=10s       keep so much from the beginning
    scale=2           every rate times that                  stretch=2      every duration times that
    scale_mean=30Mbps, scale_peak=1Gbps                      resample=50ms  steps of that length, same bits
    clip_low=1Mbps, clip_high=1Gbps                          end=hold       loop, hold or stop after the last row
    hold=0.2s         lay a per-chunk trace out in time      name=mine      what tables call it
    then=lab-cliff    another one after it (a name or a file, without settings)

Where a generator has a setting of that name (`hold`), the setting is meant. `histogram,of=NAME_OR_FILE,bins=20` draws
from the histogram of another trace instead of `edges` and `weights` of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from traces import formats, library
from traces.errors import TraceError
from traces.generators import GENERATORS, histogram_of
from traces.trace import End, Trace
from traces.units import Dimension, parse_fraction, parse_quantity, parse_rate, parse_time

TRANSFORMS: dict[str, Callable[[Trace, str], Trace]] = {
    "start": lambda trace, value: trace.shifted(parse_time(value)),
    "take": lambda trace, value: trace.sliced(0.0, parse_time(value)),
    "scale": lambda trace, value: trace.scaled(parse_quantity(value, "number")),
    "scale_mean": lambda trace, value: trace.scale_to(mean_bps=parse_rate(value)),
    "scale_peak": lambda trace, value: trace.scale_to(peak_bps=parse_rate(value)),
    "clip_low": lambda trace, value: trace.clipped(low_bps=parse_rate(value)),
    "clip_high": lambda trace, value: trace.clipped(high_bps=parse_rate(value)),
    "stretch": lambda trace, value: trace.stretched(parse_quantity(value, "number")),
    "resample": lambda trace, value: trace.resampled(parse_time(value)),
    "end": lambda trace, value: trace.with_end(cast(End, value)),
    "hold": lambda trace, value: trace.over_time(parse_time(value)),
    "then": lambda trace, value: trace.concatenated(open_trace(value)),
    "name": lambda trace, value: trace.renamed(value),
}
"""Transforms by the key a spec uses."""


NAMES_A_TRACE = ("then", "of")
"""Settings whose value is another trace: a name, or a file."""


def open_trace(spec: str | Path) -> Trace:
    """The trace that a spec, a library name or a path means. Its name is the spec, folders left away.

    Raises TraceError for an unknown name, a setting that does not exist or fit, or a file that cannot be read.
    """
    if isinstance(spec, Path) or ("," in spec and Path(spec).is_file()):
        return formats.load(spec)
    head, settings = _parsed(spec)
    if head == "histogram" and "of" in settings:
        trace, rest = _redrawn(settings)
    elif head in GENERATORS:
        trace, rest = _generated(head, GENERATORS[head], settings)
    elif head in library.names() or head.startswith("family/"):
        trace, rest = library.load(head), settings
    elif Path(head).is_file():
        trace, rest = _loaded(head, settings)
    elif plug_in := entry_points(group="kvstream.traces", name=head):
        trace, rest = _generated(head, next(iter(plug_in)).load(), settings)
    else:
        raise TraceError(_unknown(head))
    for key, value in rest.items():
        if key not in TRANSFORMS:
            if head == "histogram" and key in HISTOGRAM_OF:
                raise TraceError(f"trace {spec!r}: {key} goes with of=NAME_OR_FILE, whose histogram it divides")
            raise TraceError(f"trace {spec!r}: no setting {key!r}; {_settings_of(head)}")
        try:
            trace = TRANSFORMS[key](trace, value)
        except TraceError as error:
            raise TraceError(f"trace {spec!r}: {key}: {error}") from None
    if "name" in rest or not settings:
        return trace
    words = [f"{key}={Path(value).name if key in NAMES_A_TRACE else value}" for key, value in settings.items()]
    return trace.renamed(",".join([Path(head).name, *words]))


def _parsed(spec: str) -> tuple[str, dict[str, str]]:
    head, *parts = (part.strip() for part in spec.split(","))
    if not head or "=" in head:
        raise TraceError(f"trace {spec!r}: begin with a name or a file, as in uniform,low=10Mbps,high=50Mbps")
    settings: dict[str, str] = {}
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise TraceError(f"trace {spec!r}: {part!r} is not key=value")
        if key in settings:
            raise TraceError(f"trace {spec!r}: {key!r} is given twice")
        settings[key] = value
    return head, settings


def _generated(name: str, function: Callable[..., Trace], settings: Mapping[str, str]) -> tuple[Trace, dict[str, str]]:
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key in hints:
            try:
                values[key] = _coerced(value, hints[key])
            except TraceError as error:
                raise TraceError(f"trace {name}: {key}: {error}") from None
    try:
        trace = function(**values)
    except TraceError as error:
        raise TraceError(f"trace {name}: {error}") from None
    if not isinstance(trace, Trace):
        raise TraceError(f"trace {name}: the plug-in gave a {type(trace).__name__}, not a Trace")
    return trace, {key: value for key, value in settings.items() if key not in hints}


HISTOGRAM_OF = ("of", "bins")
"""Settings of `histogram` that stand for its edges and weights."""


def _redrawn(settings: Mapping[str, str]) -> tuple[Trace, dict[str, str]]:
    """`histogram` with the edges and weights of another trace, which stands in the provenance."""
    if given := [key for key in ("edges", "weights") if key in settings]:
        raise TraceError(f"trace histogram: of={settings['of']} brings its own {given[0]}; leave one of the two away")
    try:
        bins = _coerced(settings.get("bins", "20"), int)
    except TraceError as error:
        raise TraceError(f"trace histogram: bins: {error}") from None
    source = open_trace(settings["of"])
    edges, weights = (":".join(map(str, column)) for column in histogram_of(source, bins))
    rest = {key: value for key, value in settings.items() if key not in HISTOGRAM_OF}
    drawn, rest = _generated("histogram", GENERATORS["histogram"], {"edges": edges, "weights": weights, **rest})
    noted = source._derived(f"rates drawn from its histogram of {bins} bins (trace sha256 {source.sha256})")
    return replace(drawn, kind=source.kind, provenance=drawn.provenance + noted.provenance), rest


def _coerced(value: str, hint: Any) -> Any:
    """A setting as its annotation says: a quantity of a dimension, several, a whole number, one of some words."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TraceError(f"{value!r}; use one of {', '.join(map(str, get_args(hint)))}")
        return value
    dimension = getattr(hint, "__metadata__", (None,))[0]
    if dimension in ("rates", "times", "weights"):
        each = {"rates": parse_rate, "times": parse_time, "weights": _number}[dimension]
        return tuple(each(part) for part in value.split(":"))
    if dimension in ("rate", "time", "fraction"):
        parse: dict[Dimension, Callable[[str], float]] = {
            "rate": parse_rate,
            "time": parse_time,
            "fraction": parse_fraction,
        }
        return parse[dimension](value)
    if hint is int:
        number = _number(value)
        if not number.is_integer():
            raise TraceError(f"{value!r} is not a whole number")
        return int(number)
    return parse_quantity(value) if hint is float else value


def _number(value: str) -> float:
    return parse_quantity(value, "number")


def _loaded(path: str, settings: Mapping[str, str]) -> tuple[Trace, dict[str, str]]:
    rest = dict(settings)
    part = rest.pop("part", None)
    if part is not None and not part.isdecimal():
        raise TraceError(f"trace {path}: part={part}; parts count from 0")
    return formats.load(path, format=rest.pop("format", None), part=None if part is None else int(part)), rest


def _settings_of(head: str) -> str:
    own = [key for key in get_type_hints(GENERATORS[head]) if key != "return"] if head in GENERATORS else []
    if head == "histogram":
        own += HISTOGRAM_OF
    if not own and Path(head).is_file():
        own = ["format", "part"]
    return f"there are {', '.join(dict.fromkeys([*own, *TRANSFORMS]))}"


def _unknown(head: str) -> str:
    known = [*GENERATORS, *library.names(), *(f"family/{name}-000" for name in library.families())]
    if "/" in head or "." in head:
        return f"no trace file {head!r}, and no library trace of that name; `kvstream trace list` shows what there is"
    close = difflib.get_close_matches(head, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`kvstream trace list` shows what there is"
    return f"no trace {head!r} (no generator, library trace or file of that name); {hint}"
