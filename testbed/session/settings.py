"""What is decided about a session before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream.testbed.errors import SpecError


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """The settings of one session, the same over a real link and in the simulator. Raises SpecError."""

    deadline_s: float
    """The SLO on TTFT, from the request."""
    depth: int = 2
    """1: a level is chosen when the chunk before has arrived (the paper's Algorithm 1). 2: it is chosen just before,
    so that the link never idles and a choice is never older than one chunk."""
    overlap: bool = True
    """False holds all decoding back until the last byte: the control that shows what pipelining is worth."""
    prior_bps: float | None = None
    """Goodput expected before the first chunk; None if unknown."""
    concurrent: int = 1
    """Requests that share the link and the decoder, this one included."""
    seed: int = 0
    """For policies that draw random numbers."""

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:
            raise SpecError(f"deadline is {self.deadline_s:g} s; give a time above 0")
        if self.prior_bps is not None and not self.prior_bps > 0:
            raise SpecError(f"prior_bps is {self.prior_bps:g}; give bits per second above 0, or None if unknown")
        if self.depth not in (1, 2):
            raise SpecError(f"depth is {self.depth}; give 1 (choose on arrival) or 2 (choose just before)")
