"""The one state machine of a transfer. No I/O and no clock: it is fed with times and answers with work.

The receiver drives it with a real link and a real clock, the simulator with virtual ones; a policy cannot tell
which. The driver calls `poll` after every event, carries out the work it returns, and reports back with the
`on_*` methods. All times are seconds since the request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from policies.api import CANCEL, KEEP, TEXT, Choice, InFlight, LevelOrText, Observation, Policy, Replace, Transfer
from policies.errors import PolicyError
from testbed.errors import SpecError
from testbed.manifest import Manifest

PREFILL: Final = -1
"""The compute step after the last chunk: the prompt's prefill, which ends in the first token."""

LOOKAHEAD_MARGIN_S: Final = 0.005
"""With depth 2 the next chunk is chosen when the rest of the current one takes RTT + this."""

RATE_WINDOW_S: Final = 0.05
"""The rest of a chunk is estimated from the bytes of this last stretch of time."""

PROGRESS_S: Final = 0.005
"""How often, at least, a driver should let a policy with a progress hook be asked while a chunk is in flight."""

MAX_ATTEMPTS: Final = 3
"""A chunk that keeps arriving damaged fails the session after so many tries."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Request a chunk at a level (or its text)."""

    chunk: int
    level: LevelOrText
    bytes: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the transfer of a chunk; what arrived of it is waste."""

    chunk: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode a chunk that has arrived into the cache."""

    chunk: int
    level: int


@dataclass(frozen=True, slots=True)
class Recompute:
    """Compute a chunk's KV from its tokens; everything before it is in the cache."""

    chunk: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Run the prompt over the complete cache and emit the first token."""


Work: TypeAlias = Fetch | Cancel | Decode | Recompute | Prefill


@dataclass(frozen=True)
class Costs:
    """Estimated seconds of compute, for observations and, in the simulator, the truth."""

    decode_s: tuple[tuple[float, ...], ...]
    """[chunk][level]."""
    recompute_s: tuple[float, ...] | None
    """[chunk]; None where the receiver has no model to recompute with."""
    prefill_s: float


@dataclass(slots=True)
class ChunkRecord:
    """What happened to one chunk; a row of `chunks.jsonl`. Times are None until they happen."""

    chunk: int
    level: LevelOrText | None = None
    bytes: int = 0
    request_s: float | None = None
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    decode_start_s: float | None = None
    decode_end_s: float | None = None
    reason: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    """Why the policy's own answer was not used; None when it was."""
    attempts: int = 0
    received_bytes: int = 0
    pieces_s: tuple[tuple[float, float], ...] = ()
    """Start and end of each piece's decoding, where pieces are decoded as they arrive."""
    copies_s: tuple[tuple[float, float], ...] = ()
    """Start and end of each copy to the device, where there is one."""


@dataclass(frozen=True)
class SessionRecord:
    """The outcome of one session."""

    ttft_s: float
    deadline_s: float
    distortion: float
    levels: tuple[LevelOrText, ...]
    bytes: int
    """Bytes of the chunks used, as encoded."""
    wasted_bytes: int
    """Bytes that arrived of chunks that were cancelled or damaged."""
    policy_faults: int
    chunks: tuple[ChunkRecord, ...]

    @property
    def met(self) -> bool:
        return self.ttft_s <= self.deadline_s


class SessionFailed(RuntimeError):
    """The transfer cannot be completed; the message says why."""


Ask: TypeAlias = Callable[[Policy, Observation], Choice]
"""How a policy is asked; the receiver puts a time limit here."""


def ask_directly(policy: Policy, obs: Observation) -> Choice:
    return policy.choose(obs)


class Session:
    """One request for one context under one policy.

    depth 1 chooses when a chunk has arrived (the paper's Algorithm 1); depth 2 chooses the next chunk while the
    current one is nearly done, so that the link never idles and a choice is never older than one chunk.
    `overlap=False` holds all decoding back until the last byte: the control that shows what pipelining is worth.
    `places` bounds the encodings that are asked for and not yet decoded, None is no bound: with all of them taken the
    link waits for the decoder. Texts take no place, so that those waiting for what is before them hold up nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        policy: Policy,
        deadline_s: float,
        depth: int,
        costs: Costs,
        *,
        overlap: bool = True,
        places: int | None = None,
        rtt_s: float | None = None,
        prior_bps: float | None = None,
        concurrent: int = 1,
        seed: int = 0,
        ask: Ask = ask_directly,
    ) -> None:
        if not deadline_s > 0:
            raise SpecError(f"deadline is {deadline_s:g} s; give a time above 0")
        if depth not in (1, 2):
            raise SpecError(f"depth is {depth}; it is 1 (choose on arrival) or 2 (choose just before)")
        self.manifest = manifest
        self.deadline_s = deadline_s
        self._policy = policy
        self._ask = ask
        self._depth = depth
        self._costs = costs
        self._overlap = overlap
        self._places = places
        self._rtt_s = rtt_s
        self._lookahead_s = (rtt_s or 0.0) + LOOKAHEAD_MARGIN_S
        self._prior_bps = prior_bps
        self.concurrent = concurrent
        """Requests that share link and decoder; a driver of several changes it as they come and go."""
        self._seed = seed
        self._progress = getattr(policy, "progress", None)
        self._progress_due = False

        self._chunks = [ChunkRecord(i) for i in range(len(manifest.chunks))]
        self._unrequested = list(range(len(manifest.chunks)))
        self._sizes = tuple(c.sizes_bytes for c in manifest.chunks)
        self._tokens = tuple(c.tokens for c in manifest.chunks)
        self._text_bytes = tuple(c.text_bytes for c in manifest.chunks)
        self._ladder = tuple(level.distortion for level in manifest.levels)
        self._tables = (self._tokens, self._sizes, self._text_bytes, costs.decode_s, costs.recompute_s)
        self._in_flight: list[int] = []
        self._recent: deque[tuple[float, int]] = deque()
        self._arrived: list[int] = []
        self._computing: int | None = None
        self._computing_since_s = 0.0
        self._transfers: list[Transfer] = []
        self._last_end_s = 0.0
        self._wasted_bytes = 0
        self._uncomputed = len(manifest.chunks)
        self._prefilling = False
        self._ttft_s: float | None = None

    @property
    def chunks(self) -> Sequence[ChunkRecord]:
        """Every chunk as it is now, for who watches."""
        return self._chunks

    # --- what the driver asks

    def poll(self, now_s: float) -> list[Work]:
        """All work that can begin now. Call it after every event and at `wake_s`."""
        work: list[Work] = []
        if self._progress is not None and self._progress_due and self._in_flight:
            self._progress_due = False
            work += self._ask_progress(now_s)
        while (
            self._unrequested
            and self._has_place()
            and (not self._in_flight or (self._depth > 1 and self._may_look_ahead(now_s)))
        ):
            work.append(self._request(now_s))
        if self._computing is None:
            if self._arrived:
                if self._overlap or not (self._unrequested or self._in_flight):
                    work += self._next_compute(now_s)
            elif self._uncomputed == 0 and not self._prefilling:
                self._prefilling = True
                work.append(Prefill())
        return work

    def wake_s(self) -> float | None:
        """When `poll` should be called even if nothing happens: the current chunk is then nearly done."""
        if self._depth == 1 or not self._unrequested or len(self._in_flight) != 1 or not self._has_place():
            return None
        rest_s = self._rest_s()
        return None if rest_s is None else max(0.0, self._recent[-1][0] + rest_s - self._lookahead_s)

    @property
    def has_progress(self) -> bool:
        """Whether the policy has a progress hook, which wants to be asked every PROGRESS_S."""
        return self._progress is not None

    @property
    def done(self) -> bool:
        return self._ttft_s is not None

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Chunks requested and not complete, in the order in which the sender answers."""
        return tuple(self._in_flight)

    def record(self) -> SessionRecord:
        """The outcome; raises SessionFailed before the first token."""
        if self._ttft_s is None:
            raise SessionFailed("the session has no first token yet")
        levels = tuple(c.level for c in self._chunks if c.level is not None)
        return SessionRecord(
            ttft_s=self._ttft_s,
            deadline_s=self.deadline_s,
            distortion=self.manifest.distortion(levels),
            levels=levels,
            bytes=sum(c.bytes for c in self._chunks),
            wasted_bytes=self._wasted_bytes,
            policy_faults=sum(c.fault is not None for c in self._chunks),
            chunks=tuple(self._chunks),
        )

    def observe(self, now_s: float) -> Observation:
        """What the policy may know now."""
        left, n, costs = self._unrequested, len(self._chunks), self._costs
        first = left[0] if left else n - 1
        if len(left) == n - first or not left:  # nothing was reordered: the rest is the end of every table
            rest = slice(first if left else n, None)
            tables: list[tuple[Any, ...] | None] = [table and table[rest] for table in self._tables]
        else:
            tables = [table and tuple([table[i] for i in left]) for table in self._tables]
        tokens, sizes, text_bytes, decode_s, recompute_s = tables
        return Observation(
            chunk=first,
            n_chunks=n,
            now_s=now_s,
            deadline_s=self.deadline_s,
            remaining=tuple(left),
            tokens=tokens,  # type: ignore[arg-type]
            sizes_bytes=sizes,  # type: ignore[arg-type]
            distortion=(self._ladder,) * len(left),
            text_bytes=text_bytes,  # type: ignore[arg-type]
            recompute_s=recompute_s,
            decode_s=decode_s,  # type: ignore[arg-type]
            prefill_s=costs.prefill_s,
            transfers=tuple(self._transfers),
            in_flight=tuple([self._flight(i) for i in self._in_flight]),
            compute_backlog_s=self._backlog_s(now_s),
            rtt_s=self._rtt_s,
            prior_bps=self._prior_bps,
            concurrent=self.concurrent,
            seed=self._seed,
        )

    # --- what the driver reports

    def on_first_byte(self, chunk: int, now_s: float) -> None:
        record = self._chunks[chunk]
        if record.first_byte_s is None:
            record.first_byte_s = now_s
            self._recent.clear()
            self._recent.append((now_s, record.received_bytes))

    def on_bytes(self, chunk: int, received_bytes: int, now_s: float) -> None:
        """`received_bytes` of the chunk are here in all."""
        self._chunks[chunk].received_bytes = received_bytes
        self._recent.append((now_s, received_bytes))
        while len(self._recent) > 2 and self._recent[1][0] <= now_s - RATE_WINDOW_S:
            self._recent.popleft()
        self._progress_due = True

    def on_time(self) -> None:
        """Time has passed and nothing arrived: a policy with a progress hook wants to know that too."""
        self._progress_due = True

    def on_waste(self, nbytes: int) -> None:
        """Bytes arrived of a chunk that was cancelled before: the word had not reached the sender."""
        self._wasted_bytes += nbytes

    def on_last_byte(self, chunk: int, now_s: float) -> None:
        record = self._chunks[chunk]
        if chunk not in self._in_flight or record.level is None or record.request_s is None:
            raise SessionFailed(f"chunk {chunk} arrived without being asked for")
        self._in_flight.remove(chunk)
        self._recent.clear()
        record.received_bytes = record.bytes
        record.last_byte_s = now_s
        if record.first_byte_s is None:
            record.first_byte_s = now_s
        elapsed_s = max(now_s - max(record.request_s, self._last_end_s), 1e-9)
        self._last_end_s = now_s
        self._transfers.append(
            Transfer(
                chunk=chunk,
                level=record.level,
                bytes=record.bytes,
                request_s=record.request_s,
                first_byte_s=record.first_byte_s,
                end_s=now_s,
                goodput_bps=record.bytes * 8 / elapsed_s,
            )
        )
        self._arrived.append(chunk)

    def on_computed(
        self,
        chunk: int,
        start_s: float,
        end_s: float,
        *,
        pieces_s: Sequence[tuple[float, float]] = (),
        copies_s: Sequence[tuple[float, float]] = (),
    ) -> None:
        """Decoding or recomputing of `chunk` is done; PREFILL means the first token is out."""
        if chunk == PREFILL:
            self._ttft_s = end_s
            return
        self._computing = None
        record = self._chunks[chunk]
        record.decode_start_s = start_s
        record.decode_end_s = end_s
        record.pieces_s, record.copies_s = tuple(pieces_s), tuple(copies_s)
        self._uncomputed -= 1

    def on_failed(self, chunk: int, why: str, now_s: float) -> None:
        """A chunk arrived damaged: fetch it again, or give up after MAX_ATTEMPTS. Raises SessionFailed then."""
        record = self._chunks[chunk]
        self._wasted_bytes += record.received_bytes
        if self._computing == chunk:
            self._computing = None
        self._forget(chunk)
        if record.attempts >= MAX_ATTEMPTS:
            raise SessionFailed(f"chunk {chunk} failed {record.attempts} times, last: {why}")

    # --- inside

    def _has_place(self) -> bool:
        """Whether one more encoding may be asked for."""
        if self._places is None:
            return True
        held = [*self._in_flight, *self._arrived, *([] if self._computing is None else [self._computing])]
        return sum(self._chunks[chunk].level != TEXT for chunk in held) < self._places

    def _may_look_ahead(self, now_s: float) -> bool:
        """Whether the next chunk may be chosen while another is in flight."""
        if len(self._in_flight) >= self._depth or len(self._recent) < 2:
            return False
        rest_s = self._rest_s()
        return rest_s is not None and rest_s - (now_s - self._recent[-1][0]) <= self._lookahead_s + 1e-9

    def _rest_s(self) -> float | None:
        """Estimated seconds from the last event until the chunk in flight is complete; None if unknown."""
        if len(self._recent) < 2:
            return None
        (t0, b0), (t1, b1) = self._recent[0], self._recent[-1]
        if b1 <= b0 or t1 <= t0:
            return None
        record = self._chunks[self._in_flight[0]]
        return (record.bytes - b1) * (t1 - t0) / (b1 - b0)

    def _request(self, now_s: float) -> Fetch:
        obs = self.observe(now_s)
        fault: str | None = None
        try:
            choice = self._ask(self._policy, obs)
            _check(choice, obs)
        except Exception as error:  # a student's policy may raise anything; the run goes on
            fault = f"{type(error).__name__}: {error}"
            choice = Choice(0)
        chunk = obs.chunk if choice.chunk is None else choice.chunk
        return self._begin(chunk, choice.level, dict(choice.reason), fault, now_s)

    def _begin(
        self, chunk: int, level: LevelOrText, reason: dict[str, float], fault: str | None, now_s: float
    ) -> Fetch:
        size = self._text_bytes[chunk] if level == TEXT else self._sizes[chunk][int(level)]
        record = self._chunks[chunk]
        record.level, record.bytes, record.request_s = level, size, now_s
        record.reason, record.fault = reason, fault
        record.attempts += 1
        self._unrequested.remove(chunk)
        self._in_flight.append(chunk)
        return Fetch(chunk, level, size)

    def _ask_progress(self, now_s: float) -> list[Work]:
        """Let the policy give up on the oldest chunk in flight."""
        assert self._progress is not None
        try:
            call = getattr(self._ask, "call", None)  # an `Ask` with a time limit has one for hooks as well
            obs = self.observe(now_s)
            answer = self._progress(obs) if call is None else call(self._progress, obs)
        except Exception as error:  # as for `choose`
            self._chunks[self._in_flight[0]].fault = f"{type(error).__name__}: {error}"
            return []
        if answer == KEEP or answer is None:
            return []
        chunk = self._in_flight[0]
        replacement = answer.level if isinstance(answer, Replace) else None
        if answer != CANCEL and not self._is_level(replacement):
            self._chunks[chunk].fault = f"progress answered {answer!r}; KEEP, CANCEL or Replace(level) is known"
            return []
        self._wasted_bytes += self._chunks[chunk].received_bytes
        self._forget(chunk)
        work: list[Work] = [Cancel(chunk)]
        if replacement is not None:
            work.append(self._begin(chunk, replacement, {"replaced": 1.0}, None, now_s))
        return work

    def _is_level(self, level: object) -> bool:
        return level == TEXT or (isinstance(level, int) and 0 <= level < len(self._ladder))

    def _forget(self, chunk: int) -> None:
        """Back to the state before the request."""
        if chunk in self._in_flight:
            self._in_flight.remove(chunk)
        if chunk in self._arrived:
            self._arrived.remove(chunk)
        record = self._chunks[chunk]
        record.first_byte_s = record.last_byte_s = None
        record.received_bytes = 0
        self._recent.clear()
        self._unrequested = sorted([*self._unrequested, chunk])

    def _next_compute(self, now_s: float) -> list[Work]:
        """Begin with the oldest arrived chunk that can be computed: text needs everything before it in the cache."""
        for chunk in self._arrived:
            record = self._chunks[chunk]
            if record.level == TEXT:
                if any(before.decode_end_s is None for before in self._chunks[:chunk]):
                    continue
                step: Work = Recompute(chunk)
            else:
                assert isinstance(record.level, int)
                step = Decode(chunk, record.level)
            self._arrived.remove(chunk)
            self._computing, self._computing_since_s = chunk, now_s
            return [step]
        return []

    def _flight(self, chunk: int) -> InFlight:
        record = self._chunks[chunk]
        assert record.level is not None
        assert record.request_s is not None
        return InFlight(chunk, record.level, record.bytes, record.received_bytes, record.request_s)

    def _cost_s(self, chunk: int) -> float:
        level = self._chunks[chunk].level
        if isinstance(level, int):
            return self._costs.decode_s[chunk][level]
        return self._costs.recompute_s[chunk] if self._costs.recompute_s else 0.0

    def _backlog_s(self, now_s: float) -> float:
        backlog_s = 0.0
        for chunk in (*self._arrived, *self._in_flight):
            backlog_s += self._cost_s(chunk)
        if self._computing is not None:
            backlog_s += max(0.0, self._cost_s(self._computing) - (now_s - self._computing_since_s))
        return backlog_s


def _check(choice: object, obs: Observation) -> None:
    """Raise PolicyError unless `choice` can be carried out."""
    if not isinstance(choice, Choice):
        raise PolicyError(f"choose answered {choice!r}; return Choice(level)")
    level = choice.level
    if level == TEXT:
        if obs.recompute_s is None:
            raise PolicyError("text was chosen but this receiver has no model to recompute with")
    elif not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < obs.n_levels:
        raise PolicyError(f"level {level!r} was chosen; give 0 to {obs.n_levels - 1} or TEXT")
    if choice.chunk is not None and choice.chunk not in obs.remaining:
        raise PolicyError(f"chunk {choice.chunk!r} was chosen; it is not among the remaining ones")
