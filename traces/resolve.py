"""From a trace spec to the trace: `name,key=value,...`, quoted where a comma is part of a name (`traces.grammar`).

The name is a generator (`uniform`), a library trace (`steady`, `family/markov-003`), a file (`./log.csv`), or a
plug-in's generator (entry point `kvstream.traces`). The settings are the generator's (or, for a file, `format` and how
to read what it leaves open: `part`, `unit`, `step`, `bin`, `columns`, `repair`), and then transforms, applied in the
order written:

    start=2s          start this far into the trace          take=10s       keep this much from the start
    scale=2           multiply every rate                    stretch=2      multiply every duration
    scale_mean=30Mbps, scale_peak=1Gbps                      resample=50ms  steps of that length, same bits
    clip_low=1Mbps, clip_high=1Gbps                          end=hold       loop, hold or stop after the last row
    hold=0.2s         lay a per-chunk trace out in time      name=mine      its name in tables
    drop=delay        leave out a column: delay or loss
    then=lab-cliff    append another trace (with settings of its own if it is quoted)

A generator's own setting of the same name (`hold`) takes precedence. `histogram,of=NAME_OR_FILE,bins=20` draws
from the histogram of another trace instead of `edges` and `weights` of its own. Folders and patterns are sets of
traces: `traces.sets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from kvstream.traces import formats, grammar, library
from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import OPTIONS, Options
from kvstream.traces.generators import GENERATORS, histogram_of
from kvstream.traces.nearest import nearest
from kvstream.traces.trace import End, Trace
from kvstream.traces.units import Dimension, parse_fraction, parse_quantity, parse_rate, parse_time

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
    "drop": lambda trace, value: trace.without(value),
    "name": lambda trace, value: trace.renamed(value),
}
"""Transforms by the key a spec uses."""


NAMES_PER_TRACE = ("then", "of")
"""Settings whose value is another trace: a name, or a file."""
SET_SETTINGS = ("sample", "seed", "min_length", "max_length", "min_mean", "max_mean", "skip")
"""Settings of sets (`traces.sets`)."""

MAX_SPEC = 1000
"""Characters of a spec: messages repeat it."""


def open_trace(spec: str | Path) -> Trace:
    """The trace that a spec, a library name or a path denotes. Its name is the spec without folders.

    Raises TraceError for an unknown name, a setting that does not exist or fit, or a file that cannot be read.
    """
    if isinstance(spec, Path):
        return formats.load(spec)
    head, settings = parsed(spec)
    if settings.get("part") == "all":
        raise TraceError(
            f"trace {grammar.shown(spec)}: part=all makes a set of traces, and one is asked for here; name a part"
        )
    if head == "histogram" and "of" in settings:
        trace, rest = _redrawn(settings)
    elif head in GENERATORS:
        trace, rest = _generated(head, GENERATORS[head], settings)
    elif is_ours(head):
        trace, rest = library.load(head), settings
    elif grammar.is_file(head):
        trace, rest = _loaded(head, settings)
    elif plug_in := _plug_ins(head):
        trace, rest = _generated(head, plug_in[0].load(), settings)
    else:
        raise TraceError(_unknown(head))
    for key, value in rest.items():
        if key not in TRANSFORMS:
            if head == "histogram" and key in HISTOGRAM_OF:
                raise TraceError(
                    f"trace {grammar.shown(spec)}: {key} needs of=NAME_OR_FILE, the trace to take the histogram of"
                )
            raise TraceError(
                f"trace {grammar.shown(spec)}: unknown setting {grammar.brief(key)}; {_settings_of(head, key)}"
            )
        try:
            trace = TRANSFORMS[key](trace, value)
        except TraceError as error:
            raise TraceError(f"trace {grammar.shown(spec)}: {key}: {error}") from None
    return trace if "name" in rest or not settings else trace.renamed(label(head, settings))


def label(head: str, settings: Mapping[str, str]) -> str:
    """The name of a trace in tables: its spec without folders."""
    words = [f"{key}={Path(value).name if key in NAMES_PER_TRACE else value}" for key, value in settings.items()]
    return ",".join([Path(head).name, *words])


def is_ours(head: str) -> bool:
    """Whether a name is a library trace or, in form, a member of a family."""
    return head in library.names() or head.startswith("family/")


def is_file_like(head: str) -> bool:
    """Whether a name can only be that of a file, a folder or a pattern."""
    return not (head in GENERATORS or is_ours(head) or _plug_ins(head))


def parsed(spec: str) -> tuple[str, dict[str, str]]:
    """(name, settings) of a spec. Raises TraceError."""
    if len(spec) > MAX_SPEC:
        raise TraceError(f"trace {spec[:40]!r}... has {len(spec)} characters, more than {MAX_SPEC}")
    try:
        head, settings = grammar.parse(spec)
    except TraceError as error:
        raise TraceError(f"trace {grammar.shown(spec)}: {error}") from None
    if not head or ("=" in head and "/" not in head and not grammar.exists(head) and spec.lstrip()[0] not in "\"'"):
        raise TraceError(
            f"trace {grammar.shown(spec)}: begin with a name or a file, as in uniform,low=10Mbps,high=50Mbps"
        )
    return head, settings


def based(spec: str, folder: Path) -> str:
    """A spec whose files are looked for from a folder, as one whose files are looked for from here."""

    def there(name: str) -> str:
        return name if Path(name).is_absolute() else str(folder / name)

    head, settings = grammar.parse(spec, lambda name: grammar.exists(there(name)))
    if is_file_like(head):
        head = there(head)
    for key in NAMES_PER_TRACE:
        if key in settings:
            settings[key] = based(settings[key], folder)
    return grammar.write(head, settings)


def _plug_ins(head: str) -> list[EntryPoint]:
    return list(entry_points(group="kvstream.traces", name=head))


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
        raise TraceError(f"trace {name}: the plug-in returned a {type(trace).__name__}, not a Trace")
    return trace, {key: value for key, value in settings.items() if key not in hints}


HISTOGRAM_OF = ("of", "bins")
"""Settings of `histogram` that stand for its edges and weights."""


def _redrawn(settings: Mapping[str, str]) -> tuple[Trace, dict[str, str]]:
    """`histogram` with the edges and weights of another trace, which stands in the provenance."""
    if given := [key for key in ("edges", "weights") if key in settings]:
        raise TraceError(f"trace histogram: of={settings['of']} already defines {given[0]}; omit one of the two")
    try:
        bins = _coerced(settings.get("bins", "20"), int)
    except TraceError as error:
        raise TraceError(f"trace histogram: bins: {error}") from None
    source = open_trace(settings["of"])
    edges, weights = histogram_of(source, bins)
    drawn_from = {"edges": ":".join(f"{edge}bps" for edge in edges), "weights": ":".join(map(str, weights))}
    rest = {key: value for key, value in settings.items() if key not in HISTOGRAM_OF}
    drawn, rest = _generated("histogram", GENERATORS["histogram"], drawn_from | rest)
    noted = source._derived(f"rates drawn from its histogram of {bins} bins (trace sha256 {source.sha256})")
    return replace(drawn, kind=source.kind, provenance=drawn.provenance + noted.provenance), rest


def _coerced(value: str, hint: Any) -> Any:
    """A setting as its annotation says: a quantity of a dimension, several, a whole number, one of some words."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TraceError(f"{grammar.brief(value)}; choose from {', '.join(map(str, get_args(hint)))}")
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
            raise TraceError(f"{grammar.brief(value)} is not a whole number")
        return int(number)
    return parse_quantity(value) if hint is float else value


def _number(value: str) -> float:
    return parse_quantity(value, "number")


def _loaded(path: str, settings: Mapping[str, str]) -> tuple[Trace, dict[str, str]]:
    rest = dict(settings)
    format = rest.pop("format", None)
    try:
        options = Options.of(rest)
    except TraceError as error:
        raise TraceError(f"trace {path}: {error}") from None
    return formats.load(path, format, options=options), rest


def _settings_of(head: str, unknown: str) -> str:
    own = [key for key in get_type_hints(GENERATORS[head]) if key != "return"] if head in GENERATORS else []
    if head == "histogram":
        own += HISTOGRAM_OF
    if not own and grammar.is_file(head):
        own = ["format", *OPTIONS]
        if unknown in SET_SETTINGS:
            return f"{unknown} is for sets of traces: a folder, or a pattern of files"
    return nearest(unknown, dict.fromkeys([*own, *TRANSFORMS]))


def _unknown(head: str) -> str:
    if grammar.is_folder(head) or grammar.is_pattern(head):
        return f"{grammar.shown(head)} is a set of traces, and one is asked for here: name one of its files"
    known = [*GENERATORS, *library.names(), *(f"family/{name}-000" for name in library.families())]
    if "/" in head or "." in head:
        return f"unknown trace {grammar.shown(head)}: no such file or library trace; `kvstream trace list` shows all"
    hint = nearest(head, known, "`kvstream trace list` shows all")
    return f"unknown trace {grammar.shown(head)}: no such generator, library trace or file; {hint}"
