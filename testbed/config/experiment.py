"""What is compared with what: schemes on units, read from TOML.

A scheme is (policy, codec) and how it is driven (depth, overlap). A unit is everything else: context, trace, start
offset, deadline, link settings, seed. Every scheme runs on every unit, in an order shuffled per unit, so that all
comparisons are paired.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_type_hints

from kvstream.testbed import files
from kvstream.testbed.config import specs, type_check
from kvstream.testbed.config.opened import OpenedTraces
from kvstream.testbed.config.units import NAME, Scheme, Unit, dealt, told_apart
from kvstream.testbed.emulator.fidelity import Limits
from kvstream.testbed.errors import SpecError
from kvstream.testbed.terminal import many
from kvstream.traces import grammar, resolve
from kvstream.traces.errors import TraceError
from kvstream.traces.nearest import nearest
from kvstream.traces.trace import Trace
from kvstream.traces.units import Fraction

MAIN_JOB = Path(__file__).with_name("main.toml")
"""The experiment of `./run_testbed.sh`."""

TRACES_OF_LINKS = ("cross_trace", "up_trace")
"""Settings of links that name traces."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
"""Of a run's folder."""


REFERENCE_UNITS = 3
"""So many units have the reference lines as well, from the middle of as many equal parts of the experiment."""


def about(seconds: float) -> str:
    """`about 40 s`, `about 3 min`."""
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


@dataclass(frozen=True)
class Experiment:
    """A resolved experiment; its JSON form stands in a run's manifest."""

    name: str
    """Of the run and of its folder under `runs/`; the file's own name when left out. Example: `"evening"`."""
    contexts: tuple[str, ...]
    """Contexts whose caches are sent: names of those that come with kvstream (`docs`, `code`, `prose`, ...), or JSON
    files; for a workload, numbers of tokens. Example: `["docs", "code"]`."""
    traces: tuple[str, ...]
    """What the link does: names, files, folders or generators, with settings; `{seed}` is the repetition's seed.
    Example: `["wifi", "uniform,low=4Mbps,high=28Mbps,hold=0.2s,seed={seed}"]`."""
    deadlines_s: tuple[float, ...]
    """Deadlines of the first token, from the request: a unit for each. Example: `[0.5, 1.0]`."""
    schemes: tuple[Scheme, ...]
    """What is compared: a table `[[schemes]]` for each, with the keys below."""
    model: str = "bundled"
    """The language model: the bundled one, a name of `kvstream model list`, or a folder. Example: `"smollm2"`."""
    device: str = "cpu"
    """Where the receiver decodes and runs the model: `cpu`, or a CUDA device. Example: `"cuda"`."""
    workload: str = ""
    """A synthetic workload instead of a model and contexts; timing only. Example: `"mistral-7b,compute=a40"`."""
    chunk_tokens: int = 256
    """Tokens of a chunk. Example: `512`."""
    offsets_s: tuple[float, ...] = (0.0,)
    """Where in a trace sessions start: a unit for each. Example: `[0.0, 30.0]`."""
    contexts_in_turn: bool = False
    """Each unit has one of the contexts in turn, instead of a unit for each. Example: `true`."""
    offsets: Literal["", "random"] = ""
    """`random`: instead of `offsets_s`, one somewhere in each trace for each repetition, drawn by the seed.
    Example: `"random"`."""
    links: tuple[str, ...] = ("",)
    """Settings of the link beside its trace: a unit for each. Example: `["delay=20ms,queue=50ms", "loss=0.1%"]`."""
    repetitions: int = 1
    """How often everything is run, each time with the next seed. Example: `10`."""
    seed: int = 1
    """Of the first repetition: of the order, of `{seed}` in traces and of random starts. Example: `7`."""
    sweep: tuple[str, ...] = ()
    """Settings of schemes with their values: a scheme for every combination. Example:
    `["policy.safety=0.5,0.7,0.9", "depth=1,2"]`."""
    baseline: str = ""
    """Scheme that the others are compared with; the first one when empty. Example: `"buffer-based"`."""
    target: Fraction = 0.95
    """Share of the feasible sessions that should meet the deadline: the verdict seeks the least distortion there.
    Example: `0.9`."""
    session_s: float = 0.7
    """What a session over an emulated link takes on top of its deadline, roughly: settling the link, asking the
    questions. Only predictions of a run's length use it. Example: `2.0`."""
    max_repeats: int = 2
    """Times that a session over the fidelity limits is repeated before it is marked invalid. Example: `5`."""
    max_invalid: Fraction = 0.1
    """With a larger share of invalid units a run proves nothing: exit status 3. Example: `0.2`."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Fidelity limits that differ from the defaults, by the names below. Example: `{ p95_error = 0.2 }`."""
    capture: bool = False
    """Emulated links: capture the packets of every session at both ends, and analyse them. Example: `true`."""
    probe: bool = False
    """Probe the link with trains of packets before each session; policies see the result as `prior_bps`.
    Example: `true`."""
    carry_over: bool = False
    """Policies see as `prior_bps` what a session of the same deadline got that has just ended: the link's mean over the
    time before a session, where its trace has begun by then. Example: `true`."""
    simulated_repetitions: int = 0
    """After the sessions over emulated links, the same experiment in the simulator beside it, with so many repetitions.
    Example: `50`."""
    noise: bool = True
    """In the simulator, computing takes its estimates times random factors, as in real sessions on a CPU, and policies
    know how far it varies. Synthetic workloads take the times of their profile. Example: `false`."""
    is_quick: bool = False
    """Preview only, not comparable with other runs: the report says so. `--quick` sets it. Example: `true`."""

    def units(self) -> list[Unit]:
        """Every unit, in a fixed order. `{seed}` in a trace is the unit's seed: a link for each repetition.

        Raises TraceError for a trace that cannot be opened.
        """
        return list(self._units)

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        links = [self.opened.by_repetition[repetition] for repetition in range(self.repetitions)]
        settings = itertools.product(
            self.links,
            range(len(links[0])),
            (None,) if self.offsets else self.offsets_s,
            enumerate(self.deadlines_s),
            (None,) if self.contexts_in_turn else self.contexts,
            range(self.repetitions),
        )
        units = []
        for index, (link, number, offset_s, (place, deadline_s), context, repetition) in enumerate(settings):
            named = links[repetition][number]
            at_s = self._random_offset_s(named.trace, repetition) if offset_s is None else offset_s
            whose = context or self.contexts[(number + place + repetition) % len(self.contexts)]
            seed = self.seed + repetition
            units.append(Unit(index, whose, named.name, at_s, deadline_s, link, seed, named.trace.sha256))
        return tuple(units)

    @cached_property
    def opened(self) -> OpenedTraces:
        """The traces, opened once, sets expanded. Raises TraceError."""
        return OpenedTraces.open(self.traces, [str(self.seed + repetition) for repetition in range(self.repetitions)])

    def _random_offset_s(self, trace: Trace, repetition: int) -> float:
        """Where in a trace a repetition begins: to 10 ms, and so that a session fits in, unless the trace loops."""
        if trace.per == "chunk":
            return 0.0
        span_s = trace.duration_s - (0.0 if trace.end == "loop" else max(self.deadlines_s))
        drawn = random.Random(f"{self.seed}/{trace.sha256}/{repetition}").random()
        return math.floor(100.0 * max(span_s, 0.0) * drawn) / 100.0

    def order(self, unit: Unit) -> list[Scheme]:
        """The unit's schemes in its own random order, so that slow drifts of the machine hit all alike."""
        schemes = list(self.schemes)
        random.Random(f"{self.seed}/{unit.unit_id}").shuffle(schemes)
        return schemes if self._has_references(unit) else [scheme for scheme in schemes if not scheme.reference]

    def _has_references(self, unit: Unit) -> bool:
        n = len(self._units)
        return unit.index in {(2 * part + 1) * n // (2 * REFERENCE_UNITS) for part in range(REFERENCE_UNITS)}

    def sessions(self) -> list[tuple[Unit, Scheme]]:
        """Every session, unit by unit, in an order of which any beginning is a fair sample."""
        return [(unit, scheme) for unit in dealt(self._units, self.seed) for scheme in self.order(unit)]

    def predicted_s(self, units: Iterable[Unit]) -> float:
        """How long one session of each unit takes over an emulated link, roughly."""
        return sum(unit.deadline_s + self.session_s for unit in units)

    def simulated(self) -> Experiment:
        """The same experiment as it is simulated beside the emulated one: more repetitions, no reference lines."""
        compared = tuple(scheme for scheme in self.schemes if not scheme.reference)
        return replace(self, repetitions=self.simulated_repetitions, simulated_repetitions=0, schemes=compared)

    @property
    def size(self) -> str:
        """`24 units x 6 schemes, 4 reference lines on 3`."""
        references = sum(scheme.reference for scheme in self.schemes)
        on = sum(map(self._has_references, self.units()))
        words = f"{many(len(self.units()), 'unit')} x {many(len(self.schemes) - references, 'scheme')}"
        return f"{words}, {many(references, 'reference line')} on {on}" if references else words

    @property
    def codecs(self) -> list[str]:
        return list(dict.fromkeys(scheme.codec for scheme in self.schemes))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def quick(self) -> Experiment:
        """One context, deadline and offset of it."""
        return replace(
            self,
            name=f"{self.name}-quick",
            contexts=self.contexts[:1],
            deadlines_s=self.deadlines_s[:1],
            offsets_s=self.offsets_s[:1],
            repetitions=1,
            simulated_repetitions=0,
            is_quick=True,
        )


def load(path: str | Path) -> Experiment:
    """Read an experiment from TOML, a file or one that comes with kvstream, by its name (`main`, `smollm2`).

    Raises SpecError with the first thing that is wrong.
    """
    file = Path(path)
    shipped = {one.stem: one for one in MAIN_JOB.parent.glob("*.toml")}
    if str(path) in shipped and not file.exists():
        file = shipped[str(path)]
    try:
        data = files.parse_toml(file.read_bytes(), str(path))
    except FileNotFoundError:
        names = " and ".join(sorted(shipped))
        raise SpecError(f"{path}: no such experiment file, nor one of those that come with kvstream: {names}; "
                        "kvstream init writes one to start from") from None  # fmt: skip
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        experiment = from_dict(data | {"name": data.get("name", file.stem)})
        if file.parent == Path():
            return experiment
        # files of traces are looked for from the experiment's own folder
        traces = tuple(resolve.based(spec, file.parent) for spec in experiment.traces)
        return replace(
            experiment, traces=traces, links=tuple(_based_link(text, file.parent) for text in experiment.links)
        )
    except (SpecError, TraceError) as error:
        raise SpecError(f"{path}: {error}") from None


def _based_link(text: str, folder: Path) -> str:
    """Link settings whose trace files are looked for from a folder, as ones whose files are looked for from here."""
    settings = specs.parse_settings(text, "link")
    based = {key: resolve.based(value, folder) for key, value in settings.items() if key in TRACES_OF_LINKS}
    return ",".join(f"{key}={grammar.quoted(value)}" for key, value in (settings | based).items()) if based else text


def from_dict(data: Mapping[str, Any]) -> Experiment:
    """Check and build. Raises SpecError."""
    known = sorted(f.name for f in fields(Experiment))
    for key in data:
        if key not in known:
            raise SpecError(f"unknown setting {grammar.brief(key)}; {nearest(key, known)}")
    if "name" not in data:
        raise SpecError("name is missing; give a text")
    for key in ("contexts", "traces", "deadlines_s", "schemes"):
        if not data.get(key):
            raise SpecError(f"{key} is missing; give a list")
    for key in ("offsets_s", "links"):
        if data.get(key) == []:
            raise SpecError(f"{key} is empty; omit it or give a list")
    type_check.check(data, get_type_hints(Experiment) | {"schemes": list})  # schemes are tables yet, checked below
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return checked(Experiment(**(values | {"schemes": tuple(scheme_of(entry) for entry in data["schemes"])})))


def checked(experiment: Experiment) -> Experiment:
    """The experiment, with its own fields checked. Raises SpecError.

    What it only names (traces, policies, codecs, workloads, ...) is checked by `run.check_inputs`.
    """
    named = replace(experiment, schemes=told_apart(experiment.schemes))
    _check(named)
    return named


def scheme_of(entry: object) -> Scheme:
    """A table of a file, checked. Raises SpecError."""
    if not isinstance(entry, dict):
        raise SpecError(f"scheme {grammar.brief(entry)} is not a table; write [[schemes]] with policy and codec")
    known = sorted(f.name for f in fields(Scheme))
    for key in entry:
        if key not in known:
            raise SpecError(f"unknown scheme setting {grammar.brief(key)}; {nearest(key, known)}")
    if "policy" not in entry or "codec" not in entry:
        raise SpecError(f"scheme {grammar.brief(entry)} needs a policy and a codec")
    try:
        type_check.check(entry, get_type_hints(Scheme))
    except SpecError as error:
        raise SpecError(f"scheme {grammar.plain(str(entry['policy']))}: {error}") from None
    return Scheme(**entry)


def _check(experiment: Experiment) -> None:
    check_name(experiment.name)
    for deadline_s in experiment.deadlines_s:
        if not deadline_s > 0:
            raise SpecError(f"deadline is {grammar.brief(deadline_s)}; give a number of seconds above 0")
    for offset_s in experiment.offsets_s:
        if offset_s < 0:
            raise SpecError(f"offset is {grammar.brief(offset_s)}; give a number of seconds, 0 or more")
    if experiment.offsets and experiment.offsets_s != (0.0,):
        raise SpecError("offsets and offsets_s are both given; omit one of the two")
    _check_limits(experiment.limits)
    if experiment.chunk_tokens < 1 or experiment.repetitions < 1:
        raise SpecError("chunk_tokens and repetitions must be 1 or more")
    if experiment.simulated_repetitions < 0:
        raise SpecError("simulated_repetitions must be 0 or more")
    if experiment.max_repeats < 0:
        raise SpecError(f"max_repeats is {experiment.max_repeats}; give 0 or more")
    if not 0 <= experiment.max_invalid <= 1:
        raise SpecError(f"max_invalid is {experiment.max_invalid:g}; give a fraction from 0 to 1")
    if not 0 < experiment.target <= 1:
        raise SpecError(f"target is {experiment.target:g}; give a fraction above 0, up to 1")
    check_schemes(experiment.schemes)
    compared = [scheme.name for scheme in experiment.schemes if not scheme.reference]
    if not compared:
        raise SpecError("all schemes are reference lines; leave at least one without reference = true")
    if experiment.baseline and experiment.baseline not in compared:
        raise SpecError(
            f"baseline {grammar.brief(experiment.baseline)} is not one of the schemes that are compared; "
            f"{nearest(experiment.baseline, compared)}"
        )


def check_name(name: str) -> None:
    """Raises SpecError for the name of a run that is no name of a folder."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"name {grammar.brief(name)}: use letters, digits, '.', '_', '+' and '-', at most 64")


def check_schemes(schemes: Sequence[Scheme]) -> None:
    """Raises SpecError for a depth or a name that is none, and for two of one name."""
    for scheme in schemes:
        if scheme.depth not in (1, 2):
            raise SpecError(f"scheme {grammar.plain(scheme.name)}: depth is {scheme.depth}; use 1 or 2")
        if not NAME.fullmatch(scheme.name):
            raise SpecError(
                f"scheme name {grammar.brief(scheme.name)}: "
                "give it a label of at most 100 letters, digits and '._+-=,()'"
            )
    _unique([scheme.name for scheme in schemes], "two schemes are named {}; give one a label")


def _check_limits(limits: Mapping[str, float]) -> None:
    known = [f.name for f in fields(Limits)]
    for name, value in limits.items():
        if name not in known:
            raise SpecError(f"unknown limit {grammar.brief(name)}; {nearest(name, known)}")
        if value < 0.0:
            raise SpecError(f"limits: {name} is {grammar.brief(value)}; give a number, 0 or more")


def _unique(names: Sequence[str], message: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SpecError(message.format(repr(name)))
