"""What a policy observes, what it returns, and what it may do.

A policy picks, chunk by chunk, the level at which the next chunk of a context is fetched, so that the first
token comes before the deadline with as little distortion as possible. It is a plain object with one method,
`choose`; a fresh one is built for every session, so it may keep state. It cannot tell a real link from
the simulator.

All times are seconds since the request; sizes are bytes; rates are bits per second of goodput.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from kvstream.traces.trace import Trace

TEXT: Final = "text"
"""In place of a level: the chunk's token ids are sent and the receiver recomputes its KV. Lossless."""

LevelOrText: TypeAlias = int | Literal["text"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A chunk that has arrived."""

    chunk: int
    level: LevelOrText
    bytes: int
    request_s: float
    first_byte_s: float
    end_s: float
    goodput_bps: float
    """Bits over (end - max(request, previous end)): time spent queued behind the previous chunk is excluded."""
    burst_bytes: int = 0
    """What came at once after a pause of the link, at no rate of its own."""
    burst_end_s: float = 0.0
    """When that had come; 0 where nothing did."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A chunk that was requested and has not arrived in full."""

    chunk: int
    level: LevelOrText
    bytes: int
    received_bytes: int
    since_s: float
    """When it was requested."""
    first_byte_s: float | None = None
    """None until it shows one."""
    burst_bytes: int = 0
    """As in `Transfer`."""
    burst_end_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Computed:
    """A chunk that was decoded or recomputed."""

    chunk: int
    level: LevelOrText
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What a policy may know when it chooses. Level 0 is the smallest, higher is better."""

    chunk: int
    """The lowest chunk not yet requested; what a `Choice` without `chunk` fetches."""
    n_chunks: int
    now_s: float
    """Since the request; above 0 at the first call, because the manifest was fetched."""
    deadline_s: float
    remaining: tuple[int, ...]
    """Chunks not yet requested, ascending; the tuples below run over these."""
    tokens: tuple[int, ...]
    """[remaining chunk]: its number of tokens."""
    sizes_bytes: tuple[tuple[int, ...], ...]
    """[remaining chunk][level]."""
    distortion: tuple[tuple[float, ...], ...]
    """[remaining chunk][level], nats of KL; falls as the level rises. Text has 0."""
    text_bytes: tuple[int, ...]
    """[remaining chunk]: bytes of its token ids."""
    recompute_s: tuple[float, ...] | None
    """[remaining chunk]: estimated seconds to recompute it from text; None where the receiver cannot."""
    decode_s: tuple[tuple[float, ...], ...]
    """[remaining chunk][level]: estimated seconds to decode."""
    prefill_s: float
    """Estimated seconds from the last chunk decoded to the first token."""
    transfers: tuple[Transfer, ...] = ()
    """Chunks that have arrived, newest last; empty at the first call."""
    in_flight: tuple[InFlight, ...] = ()
    """Chunks in flight, oldest first; empty at the first call and always with depth 1."""
    compute_backlog_s: float = 0.0
    """Estimated seconds of decoding and recomputing for what has arrived or is in flight; a step that has overrun its
    estimate counts with what such a step still needs. Of this request alone: the backlog of others that share the
    decoder is not included."""
    computed: tuple[Computed, ...] = ()
    """Chunks that were decoded or recomputed, newest last. The estimates take them into account."""
    decode_spread: float = 0.0
    """Standard deviation of log(actual / estimated) seconds of a decoding to come; 0 if it is not known to vary."""
    recompute_spread: float = 0.0
    """The same of recomputing a chunk."""
    prefill_spread: float = 0.0
    """The same of the prefill."""
    rtt_s: float | None = None
    """Round trip measured on the manifest; None if not measured."""
    prior_bps: float | None = None
    """Goodput expected before the first chunk (an earlier session, or a probe); None if unknown."""
    concurrent: int = 1
    """Requests that share the link and the decoder, this one included (N_c of the paper)."""
    seed: int = 0

    @property
    def n_levels(self) -> int:
        return len(self.sizes_bytes[0])

    @property
    def left_s(self) -> float:
        """Seconds to the deadline; negative once it has passed."""
        return self.deadline_s - self.now_s


@dataclass(frozen=True, slots=True)
class Choice:
    """The level for the next chunk; `reason` is what the report and the lab show for it."""

    level: LevelOrText
    chunk: int | None = None
    """One of `Observation.remaining`; None takes `Observation.chunk`."""
    reason: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replace:
    """Answer of `progress`: give up the chunk in flight and fetch it at another level."""

    level: LevelOrText


KEEP: Final = "keep"
CANCEL: Final = "cancel"
Progress: TypeAlias = Literal["keep", "cancel"] | Replace


@runtime_checkable
class Policy(Protocol):
    """One fresh instance per session.

    Optional members: `progress(obs) -> KEEP | CANCEL | Replace(level)`, asked while a chunk is in flight, and,
    for policies with `clairvoyant = True`, `foresee(forecast)`, called once before the first choice.
    """

    def choose(self, obs: Observation) -> Choice: ...


@dataclass(frozen=True)
class TrueCompute:
    """What every step of a session will take, in seconds."""

    decode_s: tuple[tuple[float, ...], ...]
    """[chunk][level]."""
    recompute_s: tuple[float, ...] | None
    """[chunk]."""
    prefill_s: float


@dataclass(frozen=True)
class Forecast:
    """What clairvoyant policies see of the future; they only (`oracle`, `artifact-oracle`): marked in every table."""

    goodput: Trace
    """The link's true goodput from the session's start, bit/s of application bytes."""
    rtt_s: float
    depth: int
    initial_window_bytes: int | None = None
    """Slow start begins at this window; None: the connection is warm and starts at full rate."""
    compute: TrueCompute | None = None
    """Only the simulator knows it."""
    first: Observation | None = None
    """The first observation as it is expected, where the clock is real: planning ahead then takes none of its time."""
