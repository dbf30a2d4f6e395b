"""The traces of an experiment, opened once: sets expanded, names made unique, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvstream.traces import sets
from kvstream.traces.resolve import is_file_like, parsed
from kvstream.traces.trace import Trace

SEED = "{seed}"
"""In a trace's spec: the unit's seed, so that each repetition has a link of its own."""
LONG = 10.0
"""A measured trace this many times as long as a session has more to show than its beginning."""


@dataclass(frozen=True)
class Named:
    """A trace with its name in tables and the spec that opens it again."""

    name: str
    spec: str
    trace: Trace


@dataclass(frozen=True)
class OpenedTraces:
    """Traces by repetition, in the order of the experiment, and the files of sets that were skipped."""

    by_repetition: tuple[tuple[Named, ...], ...]
    skipped: Mapping[str, str]
    """[file]: why it could not be read."""

    @classmethod
    def open(cls, specs: Sequence[str], seeds: Sequence[str]) -> OpenedTraces:
        """Open every spec, for each seed. Raises TraceError."""
        found: dict[str, sets.Opened] = {}
        rows: list[list[sets.Member]] = []
        for seed in seeds:
            row: list[sets.Member] = []
            for spec in specs:
                filled = spec.replace(SEED, seed)
                if filled not in found:
                    found[filled] = sets.open_all(filled)
                row += found[filled].members
            rows.append(row)
        names = _names([member for row in rows for member in row])
        skipped = {name: why for opened in found.values() for name, why in opened.skipped.items()}
        named = tuple(tuple(Named(names[one.spec], one.spec, one.trace) for one in row) for row in rows)
        return cls(named, skipped)

    @property
    def every(self) -> dict[str, Named]:
        """[name]: each trace once."""
        return {named.name: named for row in self.by_repetition for named in row}

    def describe(self) -> dict[str, Any]:
        """For a run's manifest: hashes, where each trace comes from, and what was skipped."""
        every = self.every
        return {
            "traces": {name: named.trace.sha256 for name, named in every.items()},
            "provenance": {
                name: {
                    "spec": named.spec,
                    "kind": named.trace.kind,
                    "length_s": None if named.trace.per == "chunk" else named.trace.duration_s,
                    "mean_bps": named.trace.mean_bps,
                    "sources": [asdict(record) for record in named.trace.provenance],
                }
                for name, named in every.items()
            },
            "skipped": dict(self.skipped),
        }

    def beginnings(self, longest_s: float) -> list[str]:
        """Names of measured traces of which sessions of at most `longest_s` from the start see little."""
        return [
            name
            for name, named in self.every.items()
            if named.trace.per == "time"
            and named.trace.duration_s >= LONG * longest_s
            and any(record.sha256 for record in named.trace.provenance)
        ]


def _names(members: Sequence[sets.Member]) -> dict[str, str]:
    """[spec]: the trace's name, with as many folders before it as tell it from others of that name."""
    alike: dict[str, dict[str, Trace]] = {}
    for member in members:
        alike.setdefault(member.trace.name, {})[member.spec] = member.trace
    names: dict[str, str] = {}
    for name, traces in alike.items():
        names |= dict.fromkeys(traces, name)
        if len({trace.sha256 for trace in traces.values()}) > 1:
            names |= _told_apart(name, list(traces))
    return names


def _told_apart(name: str, specs: Sequence[str]) -> dict[str, str]:
    heads = [parsed(spec)[0] for spec in specs]
    folders = [Path(head).absolute().parent.parts if is_file_like(head) else () for head in heads]
    for depth in range(1, max(map(len, folders), default=0) + 1):
        named = ["/".join([*parts[-depth:], name]) for parts in folders]
        if len(set(named)) == len(named):
            return dict(zip(specs, named, strict=True))
    return {spec: f"{name}#{number}" for number, spec in enumerate(specs, 1)}
