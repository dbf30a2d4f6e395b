"""Buffer-based adaptation (BBA-0, Huang et al., SIGCOMM 2014, section 4) for a transfer with one deadline.

BBA maps the playback buffer to a rate: the smallest up to a reservoir, the largest beyond reservoir + cushion, a
straight line between. A KV transfer plays nothing, so the buffer is another lead, in seconds:

`pace` (default): a straight line from the request to the deadline would have delivered what has arrived at some
time; the buffer is that time minus now. It needs no bandwidth estimate. Chunks count with their bytes at the lowest
level, so that the lead does not depend on the levels chosen.
`slack`: time left minus what the rest takes at the lowest level and the last chunk's goodput.
`backlog`: seconds of decoding and recomputing that wait at the receiver; a full backlog means that the link is ahead.

BBA-0 also keeps its rate until the map crosses the next one, so that quality does not flicker; a transfer has no
viewer, and here each chunk follows the map. Reservoir and cushion are fractions of the deadline. The map is in bytes
of the next chunk, as in BBA-1's chunk map: the best level whose size is at most f(buffer).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstream.policies.api import Choice, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.measures import Pace, bytes_in_flight, bytes_left, last_bps

BUFFERS = ("pace", "slack", "backlog")


@dataclass
class BufferBased:
    """BBA with the pace lead as buffer."""

    reservoir: float = 0.02
    """Fraction of the deadline below which only the smallest level is sent."""
    cushion: float = 0.25
    """Fraction of the deadline over which the size rises from the smallest to the largest."""
    buffer: str = "pace"
    """pace, slack or backlog."""
    _pace: Pace = field(default_factory=Pace, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.buffer not in BUFFERS:
            raise PolicyError(f"buffer-based: buffer={self.buffer!r}; give one of {', '.join(BUFFERS)}")
        if not self.cushion > 0.0:
            raise PolicyError(f"buffer-based: cushion={self.cushion}; give a fraction above 0")

    def choose(self, obs: Observation) -> Choice:
        lead_s = self._lead_s(obs)
        fill = (lead_s / obs.deadline_s - self.reservoir) / self.cushion
        sizes = obs.sizes_bytes[0]
        budget_bytes = sizes[0] + (sizes[-1] - sizes[0]) * min(max(fill, 0.0), 1.0)
        level = max((i for i, size in enumerate(sizes) if size <= budget_bytes), default=0)
        return Choice(level, reason={"buffer_s": lead_s, "budget_bytes": budget_bytes})

    def _lead_s(self, obs: Observation) -> float:
        if self.buffer == "backlog":
            return obs.compute_backlog_s
        if self.buffer == "slack":
            rate_bps = last_bps(obs)
            if rate_bps is None:
                return 0.0
            rest_bytes = bytes_left(obs, 0) + bytes_in_flight(obs)
            return obs.left_s - obs.prefill_s - rest_bytes * 8.0 / max(rate_bps, 1e-9)
        return self._pace.lead_s(obs)
