"""What a shaped link did during one session, as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """The HTB class at one moment; counters since the session's start."""

    t_s: float
    """Seconds since the session's start, the middle of the reading."""
    rate_bps: float
    """The rate that the kernel has in force; 0 while the trace has an outage."""
    delivered_bytes: int
    """Layer-2 bytes that have left the queue."""
    backlog_bytes: int
    drops: int


class Change(NamedTuple):
    """A change of rate, as scheduled and as done."""

    scheduled_s: float
    actual_s: float
    rate_bps: float


class CpuSample(NamedTuple):
    """Core-seconds since the sample before."""

    t_s: float
    idle_s: float
    own_s: float
    """Spent by the threads of this run, the shaper's left out."""
    foreign_s: float
    """Spent by other programs and other virtual machines (steal)."""
    waited_s: float
    """Summed over this run's threads: ready to run, but without a processor."""
    stolen_s: float = 0.0
    """The part of `foreign_s` that other virtual machines took."""


@dataclass(frozen=True)
class LinkRecord:
    """One session on one shaped interface. Times are seconds since `t0_s`, which is on CLOCK_MONOTONIC."""

    t0_s: float
    length_s: float
    samples: tuple[Sample, ...]
    changes: tuple[Change, ...]
    cpu: tuple[CpuSample, ...]
    cores: int
    packet_bytes: int
    """Most bytes that leave as one packet: the grain of every comparison."""
    faults: tuple[str, ...]
    """What went wrong with the link itself: a class that vanished, a rate that someone else changed."""
    settings: Mapping[str, Any]
    """What the kernel said after setting up: rate, burst, queue limit, qdiscs, the shaper's scheduling."""
    impairments: Mapping[str, Any] | None = None
    """What was done to the packets by what delays and loses them (`impairments.handled`); None where nothing does."""

    @property
    def delivered_bytes(self) -> int:
        return self.samples[-1].delivered_bytes if self.samples else 0

    @property
    def drops(self) -> int:
        return self.samples[-1].drops if self.samples else 0

    @property
    def lateness_s(self) -> list[float]:
        """By how much each scheduled change was late."""
        return [change.actual_s - change.scheduled_s for change in self.changes]

    def rows(self) -> list[dict[str, float]]:
        """One row a sample, for `link.jsonl`."""
        rows, changes, late_s = [], list(self.changes), 0.0
        for sample in self.samples:
            while changes and changes[0].actual_s <= sample.t_s:
                change = changes.pop(0)
                late_s = change.actual_s - change.scheduled_s
            rows.append(
                {
                    "t_s": round(sample.t_s, 6),
                    "capacity_bps": sample.rate_bps,
                    "delivered_bytes": sample.delivered_bytes,
                    "queue_bytes": sample.backlog_bytes,
                    "drops": sample.drops,
                    "lateness_s": round(late_s, 6),
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinkRecord:
        """The inverse of `to_json`."""
        return cls(
            **{
                **data,
                "samples": tuple(Sample(*row) for row in data["samples"]),
                "changes": tuple(Change(*row) for row in data["changes"]),
                "cpu": tuple(CpuSample(*row) for row in data["cpu"]),
                "faults": tuple(data["faults"]),
            }
        )
