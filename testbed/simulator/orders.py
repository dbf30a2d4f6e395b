"""Which request goes first, and which is turned away: the built-in orders, and what one of your own looks like.

    class Longest:                                  # --order ./mine.py:Longest
        def key(self, waiting): return -waiting.stored_tokens

The least `key` goes first. An optional `admit(waiting, now_s)` is asked when a receiver is free for a request, and
turns it away with False.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from kvstream.policies import registry
from kvstream.testbed.config import specs
from kvstream.testbed.errors import SpecError


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for a receiver."""

    number: int
    arrival_s: float
    deadline_s: float
    """From its arrival."""
    tokens: int
    """Of its prompt."""
    stored_tokens: int
    """How many of these, from the first on, the store holds now."""
    prefill_s: float
    """Seconds to compute the others."""


class Order(Protocol):
    """One instance serves one run."""

    def key(self, waiting: Waiting) -> float:
        """Asked once, when the request arrives."""
        ...


@dataclass(frozen=True)
class Fcfs:
    """First come, first served."""

    admit: Literal["all", "feasible"] = "all"
    """`feasible` turns a request away once prefill alone would end after its deadline (Mooncake's early rejection)."""


@dataclass(frozen=True)
class Shortest:
    """The least to compute first, by what the store holds when a request arrives."""

    admit: Literal["all", "feasible"] = "all"


AnyOrder: TypeAlias = Fcfs | Shortest | Order
KINDS: dict[str, type[Fcfs] | type[Shortest]] = {"fcfs": Fcfs, "shortest": Shortest}


def parse(text: str) -> AnyOrder:
    """`fcfs`, `shortest,admit=feasible` or `./mine.py:Mine,gain=2`. Raises SpecError or PolicyError."""
    spec = specs.parse(text, "order")
    if spec.name in KINDS:
        kind: type[Fcfs] | type[Shortest] = KINDS[spec.name]
        return specs.build(kind, spec.settings, f"order {spec.name}")
    if ".py:" not in spec.name:
        raise SpecError(f"unknown order {spec.name!r}; choose from {', '.join(KINDS)}, or give ./file.py:Class")
    found: AnyOrder = specs.build(registry.class_from_file(spec.name, "order", "key"), spec.settings, "order")
    return found
