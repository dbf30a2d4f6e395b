"""A workload of requests in time, as texts and numbers: what `kvstream requests` compares, read from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

from kvstream.testbed import files
from kvstream.testbed.config import experiment, type_check
from kvstream.testbed.config.experiment import Scheme
from kvstream.testbed.config.units import told_apart
from kvstream.testbed.errors import SpecError
from kvstream.traces import resolve
from kvstream.traces.grammar import brief

MAX_COUNT: Final = 1_000_000
MAX_REPETITIONS: Final = 1000
SAMPLE_NAME: Final = "chats"


@dataclass(frozen=True)
class RequestsSpec:
    """A resolved experiment; its JSON form stands in the results."""

    name: str = "requests"
    requests: str = "chats"
    """A trace in Mooncake's format, or `chats`, which comes with kvstream."""
    count: int = 2000
    """Requests in a row; a trace that is shorter begins again, with new contents."""
    repetitions: int = 5
    """Rows of requests at each rate: with other arrivals, and from another place of the trace on."""
    arrivals: str = "poisson"
    """`poisson`, `bursts,size=8` or `trace`."""
    rates: tuple[float, ...] = ()
    """Requests per second; empty: those around the targets are searched for."""
    deadline_s: float = 2.0
    """The SLO on TTFT."""
    targets: tuple[float, ...] = (0.9, 0.99)
    """Shares of the requests that should meet the deadline: for each, the highest rate is told."""
    workload: str = "mistral-7b,compute=h200"
    trace: str = "constant,rate=10Gbps"
    link: str = ""
    fleet: str = ""
    """`receivers=8,slots=2,link=shared,cache=200000`."""
    order: str = "fcfs"
    schemes: tuple[Scheme, ...] = (
        Scheme("text", "kvstream", label="text"),
        Scheme("fixed,level=highest", "uniform", label="8-bit"),
        Scheme("cachegen", "cachegen", depth=1, label="cachegen"),
        Scheme("kvstream", "kvstream", label="ours"),
        Scheme("lowest", "kvstream", label="ours-lowest"),
    )
    seed: int = 1
    emulated: bool = False
    """Over an emulated link, with a process for each receiver, beside the simulator."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load(path: str | Path) -> RequestsSpec:
    """Read from TOML; files of traces and requests are looked for from its folder. Raises SpecError."""
    file = Path(path)
    try:
        data = files.parse_toml(file.read_bytes(), str(path))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    data = {"name": file.stem} | data
    if file.parent != Path():
        if isinstance(data.get("trace"), str):
            data["trace"] = resolve.based(data["trace"], file.parent)
        if isinstance(data.get("requests"), str) and data["requests"] != SAMPLE_NAME:
            data["requests"] = str(file.parent / data["requests"])
    try:
        return from_dict(data)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def from_dict(data: Mapping[str, Any]) -> RequestsSpec:
    """Check and build. Raises SpecError with the first thing that is wrong."""
    known = {f.name for f in fields(RequestsSpec)}
    for key in data:
        if key not in known:
            raise SpecError(f"unknown setting {brief(key)}; choose from {', '.join(sorted(known))}")
    type_check.check(data, get_type_hints(RequestsSpec) | {"schemes": list})
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if "schemes" in data:
        values["schemes"] = told_apart([experiment.scheme_of(entry) for entry in data["schemes"]])
    return checked(RequestsSpec(**values))


def checked(spec: RequestsSpec) -> RequestsSpec:
    """The spec, with its own fields checked; what it only names is checked where it is opened. Raises SpecError."""
    experiment.check_name(spec.name)
    if not 1 <= spec.count <= MAX_COUNT:
        raise SpecError(f"count is {spec.count}; give 1 to {MAX_COUNT} requests")
    if not 1 <= spec.repetitions <= MAX_REPETITIONS:
        raise SpecError(f"repetitions is {spec.repetitions}; give 1 to {MAX_REPETITIONS}")
    for rate in spec.rates:
        if not 0.0 < rate <= 1e6:
            raise SpecError(f"rate is {rate:g}; give requests per second above 0, up to 1e6")
    for target in spec.targets:
        if not 0.0 < target < 1.0:
            raise SpecError(f"target is {target:g}; give a fraction between 0 and 1")
    if not spec.deadline_s > 0.0:
        raise SpecError(f"deadline is {spec.deadline_s:g}; give a number of seconds above 0")
    if not spec.schemes:
        raise SpecError("schemes are empty; omit them or give a list")
    experiment.check_schemes(spec.schemes)
    for scheme in spec.schemes:
        if not scheme.overlap or scheme.reference:
            raise SpecError(f"scheme {scheme.name}: requests in time have neither overlap = false nor references")
    return spec
