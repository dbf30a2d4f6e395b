"""What is compared with what: schemes on units, read from TOML.

A scheme is (policy, codec) and how it is driven (depth, overlap). A unit is everything else: context, trace, start
offset, deadline, link settings, seed. Every scheme runs on every unit, in an order shuffled per unit, so that all
comparisons are paired.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from testbed import typed
from testbed.emulator.fidelity import Limits
from testbed.errors import SpecError

MAIN_JOB = Path(__file__).with_name("main.toml")
"""The experiment of `./run_testbed.sh`."""

SEED = "{seed}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Scheme:
    """A row of the table: one policy on one codec."""

    policy: str
    codec: str
    depth: int = 2
    overlap: bool = True
    label: str = ""

    @property
    def name(self) -> str:
        """Label of the row, unique in an experiment and safe as a file name."""
        if self.label:
            return self.label
        name = _file_name(Path(self.policy.replace(":", "-")).name)
        return name + ("" if self.depth == 2 else f"-depth{self.depth}") + ("" if self.overlap else "-no-overlap")


@dataclass(frozen=True)
class Unit:
    """One situation that every scheme is put in."""

    index: int
    context: str
    trace: str
    offset_s: float
    deadline_s: float
    link: str
    seed: int

    @property
    def unit_id(self) -> str:
        """Readable, and unique by a hash of what the unit is."""
        facts = repr((self.context, self.trace, self.offset_s, self.deadline_s, self.link, self.seed))
        name = _file_name(Path(self.context).stem if self.context.endswith(".json") else self.context)
        return f"{self.index:03d}-{name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


SESSION_S = 0.7
"""What a session over an emulated link takes beside its deadline: settling the link, asking the questions."""


def predicted_s(units: Iterable[Unit]) -> float:
    """How long one session of each unit takes over an emulated link, roughly."""
    return sum(unit.deadline_s + SESSION_S for unit in units)


def about(seconds: float) -> str:
    """`about 40 s`, `about 3 min`."""
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


@dataclass(frozen=True)
class Experiment:
    """A resolved experiment; its JSON form stands in a run's manifest."""

    name: str
    contexts: tuple[str, ...]
    traces: tuple[str, ...]
    deadlines_s: tuple[float, ...]
    schemes: tuple[Scheme, ...]
    model: str = "bundled"
    device: str = "cpu"
    """Where the receiver decodes and runs the model: `cpu`, or a CUDA device such as `cuda`."""
    workload: str = ""
    """A synthetic workload instead of a model and contexts of ours: `mistral-7b,compute=a40` (testbed.synthetic)."""
    chunk_tokens: int = 256
    offsets_s: tuple[float, ...] = (0.0,)
    links: tuple[str, ...] = ("",)
    repetitions: int = 1
    seed: int = 1
    baseline: str = ""
    """Scheme that the others are compared with; the first one when empty."""
    most_repeats: int = 2
    """A session over the fidelity limits is repeated so often before it is marked invalid."""
    most_invalid: float = 0.1
    """More than this share of invalid units, and the run says nothing: exit status 3."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Fidelity limits that differ from the defaults."""
    capture: bool = False
    """Emulated links: record the packets of every session at both ends, and keep what they say."""
    probe: bool = False
    """Before a session the link is probed with a train of packets; policies see the result as `prior_bps`."""
    is_quick: bool = False
    """A look, not a comparison: the report says so."""

    def units(self) -> list[Unit]:
        """Every unit, in a fixed order. `{seed}` in a trace is the unit's seed: a link for each repetition."""
        settings = itertools.product(
            self.links, self.traces, self.offsets_s, self.deadlines_s, self.contexts, range(self.repetitions)
        )
        return [
            Unit(
                index,
                context,
                trace.replace(SEED, str(self.seed + repetition)),
                offset_s,
                deadline_s,
                link,
                self.seed + repetition,
            )
            for index, (link, trace, offset_s, deadline_s, context, repetition) in enumerate(settings)
        ]

    def order(self, unit: Unit) -> list[Scheme]:
        """The schemes in this unit's own random order, so that slow drifts of the machine hit all alike."""
        schemes = list(self.schemes)
        random.Random(f"{self.seed}/{unit.unit_id}").shuffle(schemes)
        return schemes

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
            is_quick=True,
        )


def load(path: str | Path) -> Experiment:
    """Read an experiment from TOML. Raises SpecError with the first thing that is wrong."""
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such experiment file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as TOML: {error}") from error
    try:
        return from_dict(data | {"name": data.get("name", file.stem)})
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def from_dict(data: Mapping[str, Any]) -> Experiment:
    """Check and build. Raises SpecError."""
    known = {f.name for f in fields(Experiment)}
    for key in data:
        if key not in known:
            raise SpecError(f"no setting is called {key!r}; there are {', '.join(sorted(known))}")
    if "name" not in data:
        raise SpecError("name is missing; give a text")
    for key in ("contexts", "traces", "deadlines_s", "schemes"):
        if not data.get(key):
            raise SpecError(f"{key} is missing; give a list")
    for key in ("offsets_s", "links"):
        if data.get(key) == []:
            raise SpecError(f"{key} is empty; leave it away or give a list")
    typed.check(data, get_type_hints(Experiment) | {"schemes": list})  # schemes are tables yet, checked below
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return checked(Experiment(**(values | {"schemes": tuple(_scheme(entry) for entry in data["schemes"])})))


def checked(experiment: Experiment) -> Experiment:
    """The experiment, if it can be run. Raises SpecError otherwise."""
    _check(experiment)
    return experiment


def _scheme(entry: object) -> Scheme:
    if not isinstance(entry, dict):
        raise SpecError(f"scheme {entry!r} is not a table; write [[schemes]] with policy and codec")
    known = {f.name for f in fields(Scheme)}
    for key in entry:
        if key not in known:
            raise SpecError(f"scheme has no setting {key!r}; it has {', '.join(sorted(known))}")
    if "policy" not in entry or "codec" not in entry:
        raise SpecError(f"scheme {entry!r} needs a policy and a codec")
    try:
        typed.check(entry, get_type_hints(Scheme))
    except SpecError as error:
        raise SpecError(f"scheme {entry['policy']}: {error}") from None
    return Scheme(**entry)


def _check(experiment: Experiment) -> None:
    if not _NAME.fullmatch(experiment.name):
        raise SpecError(f"name {experiment.name!r}: use letters, digits, '.', '_' and '-', at most 64")
    for deadline_s in experiment.deadlines_s:
        if not deadline_s > 0:
            raise SpecError(f"deadline is {deadline_s!r}; give seconds above 0")
    for offset_s in experiment.offsets_s:
        if offset_s < 0:
            raise SpecError(f"offset is {offset_s!r}; give seconds of at least 0")
    _check_limits(experiment.limits)
    if experiment.workload:
        from testbed import synthetic

        workload = synthetic.parse(experiment.workload)
        for context in experiment.contexts:
            synthetic.tokens_of(context)
        for codec in experiment.codecs:
            workload.ladder(codec)
    if experiment.chunk_tokens < 1 or experiment.repetitions < 1:
        raise SpecError("chunk_tokens and repetitions are at least 1")
    if experiment.most_repeats < 0:
        raise SpecError(f"most_repeats is {experiment.most_repeats}; give 0 or more")
    if not 0 <= experiment.most_invalid <= 1:
        raise SpecError(f"most_invalid is {experiment.most_invalid:g}; give a share from 0 to 1")
    for scheme in experiment.schemes:
        if scheme.depth not in (1, 2):
            raise SpecError(f"scheme {scheme.name}: depth is {scheme.depth}; it is 1 or 2")
        if not _NAME.fullmatch(scheme.name):
            raise SpecError(f"scheme name {scheme.name!r}: give it a label of letters, digits, '.', '_' and '-'")
    _unique([scheme.name for scheme in experiment.schemes], "two schemes are called {}; give one a label")
    if experiment.baseline and experiment.baseline not in {scheme.name for scheme in experiment.schemes}:
        raise SpecError(f"baseline {experiment.baseline!r} is none of the schemes")


def _check_limits(limits: Mapping[str, float]) -> None:
    known = [f.name for f in fields(Limits)]
    for name, value in limits.items():
        if name not in known:
            raise SpecError(f"limits has no setting {name!r}; it has {', '.join(known)}")
        if value < 0.0:
            raise SpecError(f"limits: {name} is {value!r}; give a number of at least 0")


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _unique(names: Sequence[str], message: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SpecError(message.format(repr(name)))
