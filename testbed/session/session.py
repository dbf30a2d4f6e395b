"""The one state machine of a transfer. No I/O and no clock: it is fed with times and answers with work.

The receiver drives it with a real link and a real clock, the simulator with virtual ones; a policy cannot tell
which. The driver calls `poll` after every event, carries out the work it returns, and reports back with the
`on_*` methods. All times are seconds since the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvstream.policies.api import (
    CANCEL,
    KEEP,
    TEXT,
    Computed,
    InFlight,
    LevelOrText,
    Observation,
    Policy,
    Replace,
    Transfer,
)
from kvstream.policies.estimators import BURST_S
from kvstream.testbed.session.arrival_rate import ArrivalRate
from kvstream.testbed.session.ask import (
    ASK_DIRECTLY,
    Ask,
    ProgressPolicy,
    as_level,
    check_choice,
    check_reason,
    fault_of,
    shown,
)
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.estimates import OVERRUN
from kvstream.testbed.session.record import ChunkRecord, SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.session.tables import ChunkTables
from kvstream.testbed.session.work import PREFILL, Cancel, Decode, Fetch, Prefill, Recompute, Work
from kvstream.testbed.store.manifest import Manifest

LOOKAHEAD_MARGIN_S: Final = 0.005
"""With depth 2 the next chunk is chosen when the rest of the current one takes RTT + this."""

PROGRESS_S: Final = 0.005
"""How often, at least, a driver should let a policy with a progress hook be asked while a chunk is in flight."""

MAX_ATTEMPTS: Final = 3
"""A chunk that keeps arriving damaged fails the session after so many tries."""


class Session:
    """One request for one context under one policy.

    `slots` bounds the encodings that are requested and not yet decoded, None is no bound: with all of them taken the
    link waits for the decoder. Texts take no slot, so that those waiting for earlier chunks hold up nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        policy: Policy,
        settings: SessionSettings,
        costs: Costs,
        *,
        rtt_s: float | None = None,
        slots: int | None = None,
        ask: Ask = ASK_DIRECTLY,
    ) -> None:
        self.manifest = manifest
        self.settings = settings
        self.concurrent = settings.concurrent
        """Requests that share link and decoder; a driver of several changes it as they come and go."""
        self._policy = policy
        self._progress_policy: ProgressPolicy | None = policy if hasattr(policy, "progress") else None  # type: ignore[assignment]
        self._clairvoyant = bool(getattr(policy, "clairvoyant", False))
        self._ask = ask
        self._slots = slots
        self._rtt_s = rtt_s
        self._tables = ChunkTables(manifest, costs)

        self._chunks = [ChunkRecord(i) for i in range(len(manifest.chunks))]
        self._unrequested = list(range(len(manifest.chunks)))
        self._in_flight: list[int] = []
        self._rate = ArrivalRate((rtt_s or 0.0) + LOOKAHEAD_MARGIN_S, settings.prior_bps)
        self._progress_due = False
        self._transfers: list[Transfer] = []
        self._computed: list[Computed] = []
        self._last_end_s = 0.0
        self._wasted_bytes = 0
        self._arrived: list[int] = []
        self._computing: int | None = None
        self._computing_since_s = 0.0
        self._uncomputed = len(manifest.chunks)
        self._prefilling = False
        self._ttft_s: float | None = None

    @property
    def chunks(self) -> Sequence[ChunkRecord]:
        """Every chunk as it is now, for observers."""
        return self._chunks

    # --- what the driver calls

    def poll(self, now_s: float) -> list[Work]:
        """All work that can begin now. Call it after every event and at `wake_s`."""
        work: list[Work] = []
        if self._progress_due and self._in_flight:
            self._progress_due = False
            work += self._ask_progress(now_s)
        while self._unrequested and (not self._in_flight or self._may_look_ahead(now_s)) and self._has_slot():
            work.append(self._request(now_s))
        if self._computing is None:
            if self._arrived:
                if self.settings.overlap or not (self._unrequested or self._in_flight):
                    work += self._next_compute(now_s)
            elif self._uncomputed == 0 and not self._prefilling:
                self._prefilling = True
                work.append(Prefill())
        return work

    def wake_s(self) -> float | None:
        """When to call `poll` even if nothing happens: the current chunk is then nearly complete. None: not needed."""
        if self.settings.depth == 1 or not self._unrequested or len(self._in_flight) != 1 or not self._has_slot():
            return None
        wake_s = self._rate.wake_s()
        return None if wake_s is None else max(0.0, wake_s)

    @property
    def has_progress(self) -> bool:
        """Whether the policy has a progress hook, to be called at least every PROGRESS_S."""
        return self._progress_policy is not None

    @property
    def done(self) -> bool:
        """Whether the first token is out."""
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
            deadline_s=self.settings.deadline_s,
            distortion=self.manifest.distortion(levels),
            levels=levels,
            bytes=sum(c.bytes for c in self._chunks),
            wasted_bytes=self._wasted_bytes,
            policy_faults=sum(c.fault is not None for c in self._chunks),
            chunks=tuple(self._chunks),
        )

    def observe(self, now_s: float) -> Observation:
        """What the policy may know now."""
        n, remaining, tables, estimates = len(self._chunks), self._unrequested, self._tables, self._tables.estimates
        tokens, sizes_bytes, text_bytes, decode_s, recompute_s = tables.rows(remaining)
        return Observation(
            chunk=remaining[0] if remaining else n - 1,
            n_chunks=n,
            now_s=now_s,
            deadline_s=self.settings.deadline_s,
            remaining=tuple(remaining),
            tokens=tokens,
            sizes_bytes=sizes_bytes,
            distortion=(tables.ladder,) * len(remaining),
            text_bytes=text_bytes,
            recompute_s=recompute_s,
            decode_s=decode_s,
            prefill_s=tables.prefill_s,
            transfers=tuple(self._transfers),
            in_flight=tuple([self._flight(i) for i in self._in_flight]),
            compute_backlog_s=self._backlog_s(now_s),
            computed=tuple(self._computed),
            decode_spread=estimates.decode_spread,
            recompute_spread=estimates.recompute_spread,
            prefill_spread=estimates.prefill_spread,
            rtt_s=self._rtt_s,
            prior_bps=self.settings.prior_bps,
            concurrent=self.concurrent,
            seed=self.settings.seed,
        )

    # --- what the driver reports

    def on_first_byte(self, chunk: int, now_s: float) -> None:
        record = self._chunks[chunk]
        if record.first_byte_s is None:
            record.first_byte_s = now_s
            if self._is_next(chunk):
                after_pause = now_s > self._last_end_s + BURST_S
                self._rate.begin(record.bytes, now_s, record.received_bytes, after_pause=after_pause)

    def on_bytes(self, chunk: int, received_bytes: int, now_s: float) -> None:
        """`received_bytes` of the chunk are here in all."""
        self._chunks[chunk].received_bytes = received_bytes
        if self._is_next(chunk):
            self._rate.add(now_s, received_bytes)
        self._progress_due = self._progress_policy is not None

    def on_time(self) -> None:
        """Time has passed and nothing arrived: a policy with a progress hook is asked all the same."""
        self._progress_due = self._progress_policy is not None

    def on_waste(self, nbytes: int) -> None:
        """Bytes arrived of a cancelled chunk: the cancellation had not reached the sender."""
        self._wasted_bytes += nbytes

    def on_last_byte(self, chunk: int, now_s: float) -> None:
        record = self._chunks[chunk]
        if chunk not in self._in_flight or record.level is None or record.request_s is None:
            raise SessionFailed(f"chunk {chunk} arrived unrequested")
        record.received_bytes = record.bytes
        record.last_byte_s = now_s
        if record.first_byte_s is None:
            record.first_byte_s = now_s
        elapsed_s = max(now_s - max(record.request_s, self._last_end_s), 1e-9)
        goodput_bps = record.bytes * 8 / elapsed_s
        if record.level != TEXT and self._is_next(chunk):
            self._rate.end(now_s, goodput_bps)
        burst_end_s, burst_bytes = self._burst(chunk)
        self._transfers.append(
            Transfer(
                chunk=chunk,
                level=record.level,
                bytes=record.bytes,
                request_s=record.request_s,
                first_byte_s=record.first_byte_s,
                end_s=now_s,
                goodput_bps=goodput_bps,
                burst_bytes=burst_bytes,
                burst_end_s=burst_end_s,
            )
        )
        self._last_end_s = now_s
        self._leave_flight(chunk)
        self._arrived.append(chunk)

    def on_computed(
        self,
        chunk: int,
        start_s: float,
        end_s: float,
        *,
        pieces_s: Sequence[tuple[float, float]] = (),
    ) -> None:
        """Decoding or recomputing of `chunk` is done; PREFILL means the first token is out."""
        if chunk == PREFILL:
            self._ttft_s = end_s
            return
        self._computing = None
        record = self._chunks[chunk]
        record.decode_start_s = start_s
        record.decode_end_s = end_s
        record.pieces_s = tuple(pieces_s)
        self._uncomputed -= 1
        assert record.level is not None
        self._computed.append(Computed(chunk, record.level, start_s, end_s))
        self._tables.learn(chunk, record.level, record.computing_s or 0.0)

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

    def _has_slot(self) -> bool:
        """Whether one more encoding may be requested."""
        if self._slots is None:
            return True
        held = [*self._in_flight, *self._arrived, *([] if self._computing is None else [self._computing])]
        return sum(self._chunks[chunk].level != TEXT for chunk in held) < self._slots

    def _may_look_ahead(self, now_s: float) -> bool:
        """Whether the next chunk may be chosen while another is in flight."""
        if len(self._in_flight) >= self.settings.depth:
            return False
        if self._clairvoyant:  # waiting would tell it nothing, and cost a round trip where the rate is misjudged
            return self._chunks[self._in_flight[0]].first_byte_s is not None
        ready_s = self._rate.ready_s()
        return ready_s is not None and now_s >= ready_s - 1e-9

    def _is_next(self, chunk: int) -> bool:
        """Whether it is the oldest chunk in flight."""
        return bool(self._in_flight) and self._in_flight[0] == chunk

    def _burst(self, chunk: int) -> tuple[float, int]:
        """When the burst with which a chunk in flight began had come, and its bytes."""
        return self._rate.burst if self._is_next(chunk) else (0.0, 0)

    def _leave_flight(self, chunk: int) -> None:
        """A chunk has arrived or is given up. The next one may have begun to arrive, from another sender."""
        was_next = self._is_next(chunk)
        self._in_flight.remove(chunk)
        if not was_next:
            return
        self._rate.clear()
        after = self._chunks[self._in_flight[0]] if self._in_flight else None
        if after is not None and after.first_byte_s is not None:
            self._rate.begin(after.bytes, self._last_end_s, after.received_bytes, after_pause=False)

    def _request(self, now_s: float) -> Fetch:
        obs = self.observe(now_s)
        fault: str | None = None
        try:
            choice = self._ask.choose(self._policy, obs)
            level, chunk = check_choice(choice, obs)
            reason, fault = check_reason(choice.reason)
        except Exception as error:  # a policy may raise anything; the session goes on
            fault = fault_of(error)
            level, chunk, reason = 0, obs.chunk, {}
        return self._begin(chunk, level, reason, fault, now_s)

    def _begin(
        self, chunk: int, level: LevelOrText, reason: dict[str, float], fault: str | None, now_s: float
    ) -> Fetch:
        size = self._tables.size_bytes(chunk, level)
        record = self._chunks[chunk]
        record.level, record.bytes, record.request_s = level, size, now_s
        record.reason, record.fault = reason, fault
        record.attempts += 1
        self._unrequested.remove(chunk)
        self._in_flight.append(chunk)
        return Fetch(chunk, level, size)

    def _ask_progress(self, now_s: float) -> list[Work]:
        """Let the policy give up on the oldest chunk in flight."""
        assert self._progress_policy is not None
        try:
            answer: object = self._ask.progress(self._progress_policy, self.observe(now_s))
        except Exception as error:  # as for `choose`
            self._chunks[self._in_flight[0]].fault = fault_of(error)
            return []
        if answer is None or (isinstance(answer, str) and answer == KEEP):
            return []
        chunk = self._in_flight[0]
        replacement = as_level(answer.level, self._tables.n_levels) if isinstance(answer, Replace) else None
        if replacement is None and not (isinstance(answer, str) and answer == CANCEL):
            self._chunks[chunk].fault = f"progress returned {shown(answer)}; return KEEP, CANCEL or Replace(level)"
            return []
        self._wasted_bytes += self._chunks[chunk].received_bytes
        self._forget(chunk)
        work: list[Work] = [Cancel(chunk)]
        if replacement is not None:
            work.append(self._begin(chunk, replacement, {"replaced": 1.0}, None, now_s))
        return work

    def _forget(self, chunk: int) -> None:
        """Back to the state before the request."""
        if chunk in self._in_flight:
            self._leave_flight(chunk)
        if chunk in self._arrived:
            self._arrived.remove(chunk)
        record = self._chunks[chunk]
        record.first_byte_s = record.last_byte_s = None
        record.received_bytes = 0
        self._unrequested = sorted([*self._unrequested, chunk])

    def _next_compute(self, now_s: float) -> list[Work]:
        """Begin with the oldest arrived chunk that can be computed: text needs all earlier chunks in the cache."""
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
        burst_end_s, burst_bytes = self._burst(chunk)
        return InFlight(
            chunk=chunk,
            level=record.level,
            bytes=record.bytes,
            received_bytes=record.received_bytes,
            since_s=record.request_s,
            first_byte_s=record.first_byte_s,
            burst_bytes=burst_bytes,
            burst_end_s=burst_end_s,
        )

    def _cost_s(self, chunk: int) -> float:
        return self._tables.cost_s(chunk, self._chunks[chunk].level)

    def _backlog_s(self, now_s: float) -> float:
        backlog_s = 0.0
        for chunk in (*self._arrived, *self._in_flight):
            backlog_s += self._cost_s(chunk)
        if self._computing is not None:
            had_s = now_s - self._computing_since_s
            backlog_s += max(self._cost_s(self._computing) - had_s, OVERRUN * had_s)
        return backlog_s
