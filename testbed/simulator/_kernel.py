"""The compiled loop of sessions under built-in policies: session, driver, fluid link and rules, in the same arithmetic.

Every function mirrors one of the Python modules that it names, operation by operation, so that results are the same to
the last bit; `tests/testbed/simulator/test_compiled.py` compares them. In what is left out (cancelling, reordering,
slow start, clairvoyance) these policies have no part. Chunks are requested in order, so that what has arrived, what is
in flight and what is to come are ranges. One file, because numba's cache notices changes in this file only; plain
tuples in signatures, because with a class it breaks when the class is renamed.
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

import math
import sys

import numba
import numpy as np

from kvstream.policies.estimators import BURST_S, SAMPLE_BYTES, SAMPLE_S
from kvstream.testbed.session.arrival_rate import RATE_WINDOW_S
from kvstream.testbed.session.estimates import LARGEST, OVERRUN
from kvstream.testbed.session.session import LOOKAHEAD_MARGIN_S
from kvstream.testbed.simulator.simulator import EPSILON_S
from kvstream.traces.fluid import (
    FRAME_BYTES,
    FRAMES_PER_ANSWER,
    FRAMES_PER_LARGE_ANSWER,
    LARGE_FRAME_BYTES,
    MIN_FRAME_BYTES,
)

LOOP, HOLD, STOP = range(3)
"""Ends of a trace."""
FIXED, CACHEGEN, THROUGHPUT, BUFFER = range(4)
"""Kinds of rules."""
LAST, ARITHMETIC, HARMONIC, SLIDING_MIN = range(4)
"""Estimators of `throughput`."""
PACE, SLACK, BACKLOG = range(3)
"""Buffers of `buffer-based`."""
TEXT = -1
"""A chunk's level."""
N_REASONS = 4
REQUEST, FIRST_BYTE, LAST_BYTE, DECODE_START, DECODE_END = range(5)
"""Columns of a chunk's times."""
NO_CHUNK, PREFILL = -1, -2
SUM_IS_COMPENSATED = sys.version_info >= (3, 12)
"""Since then Python's `sum` of floats is Neumaier's."""
KNOWN, SIZE, FIRST, BURST_UNTIL, BURST_END, BURST_BYTES, HEAD, TAIL = range(8)
"""Fields of the state of `ArrivalRate`; its points are rows HEAD to TAIL of an array."""


def _jit(function):
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.njit(nogil=True)(function)


# --- sums as Python computes them


@_jit
def _plus(total, rest, value):
    """One step of `sum`: (total, what rounding lost of it)."""
    new = total + value
    if SUM_IS_COMPENSATED:
        if abs(total) >= abs(value):
            rest += (total - new) + value
        else:
            rest += (value - new) + total
    return new, rest


@_jit
def _total(total, rest):
    return total + rest if rest != 0.0 and math.isfinite(rest) else total


@_jit
def _recompute_left_s(recompute_s, chunk, factor):
    total, rest = 0.0, 0.0
    for k in range(chunk, len(recompute_s)):
        total, rest = _plus(total, rest, factor * recompute_s[k])
    return _total(total, rest)


# --- kvstream.traces.trace, for one trace: (edges, bits, rates, end, per_chunk)


@_jit
def _right_of(values, value):
    """bisect_right."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if value < values[middle]:
            high = middle
        else:
            low = middle + 1
    return low


@_jit
def _left_of(values, value, low):
    """bisect_left from `low` on, in steps that double: the place is often near."""
    at, step = low, 1
    while at < len(values) and values[at] < value:
        low, at, step = at + 1, at + step, 2 * step
    high = min(at, len(values))
    while low < high:
        middle = (low + high) // 2
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _divmod(value, by):
    """Python's of two floats that are not negative."""
    mod = np.fmod(value, by)
    quotient = (value - mod) / by
    floor = np.floor(quotient)
    if quotient - floor > 0.5:
        floor += 1.0
    return floor, mod


@_jit
def _bits_within(trace, t_s):
    edges, bits, rates, _, _ = trace
    row = _right_of(edges, t_s) - 1
    return bits[-1] if row >= len(rates) else bits[row] + rates[row] * (t_s - edges[row])


@_jit
def _bits_by(trace, t_s):
    edges, bits, rates, end, _ = trace
    length = edges[-1]
    if t_s >= length:
        if end == LOOP:
            passes, t_s = _divmod(t_s, length)
            return passes * bits[-1] + _bits_within(trace, t_s)
        return bits[-1] + (rates[-1] * (t_s - length) if end == HOLD else 0.0)
    return _bits_within(trace, t_s)


@_jit
def _when(trace, target):
    edges, bits, rates, _, _ = trace
    row = _left_of(bits, target, 0) - 1
    return edges[row] + (target - bits[row]) / rates[row]


@_jit
def _time_for(trace, bits, start_s):
    edges, sums, rates, end, _ = trace
    if bits == 0.0:
        return 0.0
    length, total = edges[-1], sums[-1]
    if end == LOOP:
        if total == 0.0 or bits == math.inf:
            return math.inf
        start_s = np.fmod(start_s, length) if start_s >= length else start_s
        target = _bits_within(trace, start_s) + bits
        if target <= total:
            return max(_when(trace, target) - start_s, 0.0)
        passes, target = _divmod(target, total)
        if target == 0.0:
            passes, target = passes - 1.0, total
        return passes * length + _when(trace, target) - start_s
    last = rates[-1] if end == HOLD else 0.0
    if start_s >= length:
        return bits / last if last > 0.0 else math.inf
    target = _bits_within(trace, start_s) + bits
    if target <= total:
        return max(_when(trace, target) - start_s, 0.0)
    return (length - start_s) + (target - total) / last if last > 0.0 else math.inf


@_jit
def _chunk_rate(trace, chunk):
    rates, end = trace[2], trace[3]
    n = len(rates)
    if chunk >= n and end == STOP:
        return 0.0
    return rates[chunk % n if end == LOOP else min(chunk, n - 1)]


# --- kvstream.traces.fluid


@_jit
def frame_bytes(size):
    small = min(FRAME_BYTES, max(MIN_FRAME_BYTES, size // FRAMES_PER_ANSWER))
    return max(small, min(LARGE_FRAME_BYTES, size // FRAMES_PER_LARGE_ANSWER))


@_jit
def _serve(trace, bits, start_s, chunk):
    if not trace[4]:
        return _time_for(trace, bits, start_s)
    rate = _chunk_rate(trace, chunk)
    return bits / rate if rate > 0.0 else math.inf if bits > 0.0 else 0.0


@_jit
def _answer(trace, start_s, size, frame, chunk):
    """(first byte, end of the first frame, last byte), of an answer that the link takes up at `start_s`."""
    if start_s == math.inf:
        return math.inf, math.inf, math.inf
    edges, sums, rates, _, per_chunk = trace
    if not per_chunk and start_s < edges[-1]:
        row = _right_of(edges, start_s) - 1
        base = sums[row] + rates[row] * (start_s - edges[row])
        if base + size * 8.0 <= sums[-1]:
            target = base + 8.0
            row = _left_of(sums, target, row) - 1
            first_s = start_s + (edges[row] + (target - sums[row]) / rates[row] - start_s)
            target = base + frame * 8.0
            row = _left_of(sums, target, row) - 1
            frame_s = start_s + (edges[row] + (target - sums[row]) / rates[row] - start_s)
            target = base + size * 8.0
            row = _left_of(sums, target, row) - 1
            last_s = start_s + (edges[row] + (target - sums[row]) / rates[row] - start_s)
            return min(first_s, last_s), min(frame_s, last_s), last_s
    first_s = start_s + _serve(trace, 8.0, start_s, chunk)
    frame_s = start_s + _serve(trace, frame * 8.0, start_s, chunk)
    last_s = start_s + _serve(trace, size * 8.0, start_s, chunk)
    return min(first_s, last_s), min(frame_s, last_s), last_s


@_jit
def _bytes_between(trace, start_s, end_s, chunk):
    if trace[4]:
        return _chunk_rate(trace, chunk) * (end_s - start_s) / 8.0
    return (_bits_by(trace, end_s) - _bits_by(trace, start_s)) / 8.0


@_jit
def _next_change_s(trace, after_s):
    edges, _, _, end, per_chunk = trace
    if per_chunk:
        return math.inf
    ends = edges[1:]
    if end != LOOP:
        at = _right_of(ends, after_s)
        return ends[at] if at < len(ends) else math.inf
    passes, within_s = _divmod(after_s, ends[-1])
    return passes * ends[-1] + ends[_right_of(ends, within_s) % len(ends)]


# --- kvstream.testbed.session.arrival_rate; nan for None


@_jit
def _clear(rate):
    rate[HEAD] = rate[TAIL] = 0.0
    rate[BURST_END] = rate[BURST_BYTES] = 0.0


@_jit
def _add(rate, points, now_s, received):
    """Returns the points, which may have moved."""
    if now_s <= rate[BURST_UNTIL]:
        rate[HEAD] = rate[TAIL] = 0.0
        rate[BURST_END], rate[BURST_BYTES] = now_s, received
    head, tail = int(rate[HEAD]), int(rate[TAIL])
    if tail == len(points):
        moved = np.empty((2 * len(points), 2)) if 2 * (tail - head) > len(points) else points
        for at in range(tail - head):
            moved[at, 0], moved[at, 1] = points[head + at, 0], points[head + at, 1]
        points, head, tail = moved, 0, tail - head
    points[tail, 0], points[tail, 1] = now_s, received
    tail += 1
    while tail - head > 2 and points[head + 1, 0] <= now_s - RATE_WINDOW_S:
        head += 1
    rate[HEAD], rate[TAIL] = head, tail
    return points


@_jit
def _window_rate(rate, points):
    head, tail = int(rate[HEAD]), int(rate[TAIL])
    if tail - head < 2:
        return math.nan
    t0, b0 = points[head, 0], points[head, 1]
    t1, b1 = points[tail - 1, 0], points[tail - 1, 1]
    return (b1 - b0) / (t1 - t0) if b1 > b0 and t1 > t0 else math.nan


@_jit
def _is_known(rate, points):
    head, tail = int(rate[HEAD]), int(rate[TAIL])
    if tail == head:
        return False
    last_s, received = points[tail - 1, 0], points[tail - 1, 1]
    return last_s - rate[FIRST] >= SAMPLE_S - 1e-9 and received - rate[BURST_BYTES] >= SAMPLE_BYTES


@_jit
def _ready_s(rate, points, lookahead_s):
    found = _window_rate(rate, points) if _is_known(rate, points) else math.nan
    if math.isnan(found):
        found = rate[KNOWN] / 8.0
    size = rate[SIZE]
    frame = frame_bytes(int(size))
    tail = int(rate[TAIL])
    if tail == int(rate[HEAD]) or math.isnan(found) or found == 0.0 or frame >= size:
        return math.nan
    last_s, received = points[tail - 1, 0], points[tail - 1, 1]
    return last_s + max((size - received) / found - lookahead_s, (frame - received) / found)


@_jit
def _wake_s(rate, points, lookahead_s):
    tail = int(rate[TAIL])
    if tail == int(rate[HEAD]):
        return math.nan
    ready_s = _ready_s(rate, points, lookahead_s)
    if _is_known(rate, points):
        return ready_s
    last_s, received = points[tail - 1, 0], points[tail - 1, 1]
    missing, found = rate[BURST_BYTES] + SAMPLE_BYTES - received, _window_rate(rate, points)
    if missing <= 0:
        known_s = last_s + 0.0
    elif not math.isnan(found) and found != 0.0:
        known_s = last_s + missing / found
    else:
        known_s = last_s + SAMPLE_S
    known_s = max(known_s, rate[FIRST] + SAMPLE_S)
    return known_s if math.isnan(ready_s) else min(ready_s, known_s)


# --- kvstream.policies: the rules, and what they compute from an observation


@_jit
def _least(values, first):
    found = values[first]
    for at in range(first + 1, len(values)):
        found = min(found, values[at])
    return found


@_jit
def _estimate(rates, window, estimator):
    """kvstream.policies.estimators, of the newest of a window; each has a window of its own, too."""
    n = len(rates)
    first = max(0, n - window)
    if estimator == LAST:
        return rates[-1]
    if estimator == SLIDING_MIN:
        return _least(rates, max(first, n - 3))
    first = max(first, n - 5)
    total, rest = 0.0, 0.0
    if estimator == ARITHMETIC:
        for at in range(first, n):
            total, rest = _plus(total, rest, rates[at])
        return _total(total, rest) / (n - first)
    if _least(rates, first) <= 0.0:
        return 0.0
    for at in range(first, n):
        total, rest = _plus(total, rest, 1.0 / rates[at])
    return (n - first) / _total(total, rest)


@_jit
def _choose(rule, context, seen, rates, bytes_left, reason):
    """The level for the next chunk. `reason` takes what the rule shows for it, nan where it shows nothing.

    `seen` is the observation: (now, deadline, chunk, waiting bytes, pace: bytes at the lowest level that have come,
    backlog, decode and recompute factors, prefill, requests at once).
    """
    kind, level, told, reserve_s, margin, estimator, window, safety, buffer, reservoir, cushion = rule
    sizes, _, decode_s, recompute_s, can_recompute, lowest_bytes = context
    now_s, deadline_s, chunk, waiting, come, backlog_s, decode, recompute, prefill_s, concurrent = seen
    n_chunks, n_levels = sizes.shape
    left_s = deadline_s - now_s
    for at in range(len(reason)):
        reason[at] = math.nan
    if kind == FIXED:
        return level
    rate = rates[-1] if len(rates) else math.nan
    if kind == BUFFER:
        if buffer == BACKLOG:
            lead_s = backlog_s
        elif buffer == SLACK:
            rest = bytes_left[chunk, 0] + waiting
            lead_s = left_s - prefill_s - rest * 8.0 / max(rate, 1e-9) if len(rates) else 0.0
        else:
            share = min(come / lowest_bytes, 1.0)
            lead_s = share * (deadline_s - prefill_s) - now_s
        fill = (lead_s / deadline_s - reservoir) / cushion
        smallest, largest = sizes[chunk, 0], sizes[chunk, n_levels - 1]
        budget = smallest + (largest - smallest) * min(max(fill, 0.0), 1.0)
        best = 0
        for at in range(n_levels):
            if sizes[chunk, at] <= budget:
                best = at
        reason[0], reason[1] = lead_s, budget
        return best
    text_s = _recompute_left_s(recompute_s, chunk, recompute) if can_recompute else math.inf
    ends_s = 0.0
    if kind == CACHEGEN:
        left_s -= reserve_s + margin * deadline_s if told else reserve_s
        tail_s = backlog_s + prefill_s if told else 0.0
        if can_recompute:
            text_s = concurrent * text_s + tail_s
        reason[0] = left_s
        if can_recompute and text_s <= left_s:
            reason[1] = text_s
            return TEXT
        if len(rates) == 0:
            return level
        seconds_per_byte = 8.0 * concurrent / max(rate, 1e-9)
        reason[3] = rate
        for at in range(n_levels - 1, -1, -1):
            ends_s = (bytes_left[chunk, at] + (waiting if told else 0)) * seconds_per_byte
            if told:
                ends_s += decode * decode_s[n_chunks - 1, at] + prefill_s
            reason[2] = ends_s
            if ends_s <= left_s:
                return at
        return TEXT if can_recompute and text_s < ends_s else 0
    if len(rates) == 0:
        return level
    estimate = _estimate(rates, window, estimator)
    seconds_per_byte = 8.0 / max(safety * estimate, 1e-9)
    reason[0] = estimate
    for at in range(n_levels - 1, -1, -1):
        ends_s = (waiting + bytes_left[chunk, at]) * seconds_per_byte + (
            decode * decode_s[n_chunks - 1, at] + prefill_s
        )
        reason[1] = ends_s
        if ends_s <= left_s:
            return at
    if can_recompute and backlog_s + text_s + prefill_s < ends_s:
        reason[1] = math.nan
        return TEXT
    return 0


# --- kvstream.testbed.session.estimates: what was learned is (weight, sum); a spread is (shared, own variance, weight
# of one step)


@_jit
def _learn(learned, spread, expected_s, took_s):
    shared, own, weight = spread
    if shared == 0.0 or not expected_s > 0.0:
        return
    far = math.log(max(took_s, 1e-9) / expected_s)
    learned[1] += shared * min(max(far, -LARGEST), LARGEST) / own
    learned[0] += weight


@_jit
def _factor(learned, shared):
    return math.exp(shared * (learned[1] / learned[0])) if learned[1] != 0.0 else 1.0


# --- kvstream.testbed.session.session and kvstream.testbed.simulator.simulator


@_jit
def _session(rule, context, costs, trace, setting, factors, levels, times, reasons, points):
    """One session: the time of its first token, inf if the link carries nothing more; fills in what happened to each
    chunk. `points` is room for the rate's window."""
    sizes, text_bytes, decode_s, recompute_s, _, _ = context
    prefill_s, decode_spread, recompute_spread, prefill_shared, bytes_left = costs
    deadline_s, depth, overlap, prior_bps, concurrent, rtt_s, manifest_bytes = setting
    decode_by, recompute_by, prefill_by = factors
    n = len(sizes)
    lookahead_s = rtt_s + LOOKAHEAD_MARGIN_S
    rate, learned, single = np.zeros(8), np.array((1.0, 0.0)), np.empty(1)
    rate[KNOWN] = prior_bps
    goodputs, n_goodputs = np.empty(n), 0
    received = np.zeros(n, np.int64)
    chunk_bytes = np.zeros(n, np.int64)
    now_s = _answer(trace, rtt_s, manifest_bytes, manifest_bytes, 0)[2] if manifest_bytes else rtt_s
    free_at_s = now_s if manifest_bytes else 0.0
    requested = placed = arrived = begun = done = 0
    """Chunks below these numbers were requested, put on the link, received, begun to be computed, computed."""
    computing, compute_start_s, compute_end_s = NO_CHUNK, 0.0, math.inf
    prefilling = on_link = seen = False
    first_s = last_s = event_s = change_s = math.inf
    last_end_s, come = 0.0, 0
    while True:
        # Session.poll
        while requested < n:
            flying = requested - arrived
            if flying > 0:
                if flying >= depth:
                    break
                ready_s = _ready_s(rate, points, lookahead_s)
                if math.isnan(ready_s) or not now_s >= ready_s - 1e-9:
                    break
            # Session.observe
            decode, recompute = _factor(learned, decode_spread[0]), _factor(learned, recompute_spread[0])
            backlog_s, waiting, partly = 0.0, 0, 0.0
            for k in range(begun, requested):
                backlog_s += recompute_s[k] * recompute if levels[k] == TEXT else decode_s[k, levels[k]] * decode
            if computing >= 0:
                k, had_s = computing, now_s - compute_start_s
                expected_s = recompute_s[k] * recompute if levels[k] == TEXT else decode_s[k, levels[k]] * decode
                backlog_s += max(expected_s - had_s, OVERRUN * had_s)
            for k in range(arrived, requested):
                waiting += chunk_bytes[k] - received[k]
                partly += sizes[k, 0] * received[k] / chunk_bytes[k]
            rates = goodputs[:n_goodputs]
            if n_goodputs == 0:
                rates = single[:0]
                if flying > 0 and levels[arrived] != TEXT:
                    begin_s = max(first_s if seen else times[arrived, REQUEST] + rtt_s, last_end_s)
                    size = received[arrived] - int(rate[BURST_BYTES])
                    if not (now_s - begin_s < SAMPLE_S - 1e-9 or size < SAMPLE_BYTES):
                        single[0] = size * 8.0 / (now_s - max(begin_s, rate[BURST_END]))
                        rates = single
                if len(rates) == 0 and not math.isnan(prior_bps):
                    single[0] = prior_bps
                    rates = single
            observed = (
                now_s, deadline_s, requested, waiting, come + partly, backlog_s, decode, recompute,
                _factor(learned, prefill_shared) * prefill_s, concurrent,
            )  # fmt: skip
            level = _choose(rule, context, observed, rates, bytes_left, reasons[requested])
            levels[requested] = level
            chunk_bytes[requested] = text_bytes[requested] if level == TEXT else sizes[requested, level]
            times[requested, REQUEST] = now_s
            requested += 1
        if computing == NO_CHUNK and not prefilling:
            if begun < arrived:
                if overlap or arrived == n:
                    computing, compute_start_s = begun, now_s
                    if levels[begun] == TEXT:
                        compute_end_s = now_s + recompute_by[begun] * recompute_s[begun]
                    else:
                        compute_end_s = now_s + decode_by[begun] * decode_s[begun, levels[begun]]
                    begun += 1
            elif done == n:
                prefilling = True
                compute_end_s = now_s + prefill_by * prefill_s
        # _Driver.run
        if not on_link:
            if placed < requested:
                size = chunk_bytes[placed]
                fine = depth > 1 and size > MIN_FRAME_BYTES
                start_s = times[placed, REQUEST] + rtt_s
                if start_s < free_at_s:
                    start_s = free_at_s
                frame = frame_bytes(size) if fine else size
                first_s, event_s, last_s = _answer(trace, start_s, size, frame, placed)
                free_at_s = last_s
                if fine:
                    change_s = _next_change_s(trace, first_s)
                on_link, seen = True, False
                placed += 1
        elif depth > 1 and event_s <= now_s:
            event_s = last_s
            dead = last_s == math.inf and (trace[3] == LOOP or _next_change_s(trace, now_s) == math.inf)
            if not dead and requested < n and requested - arrived == 1:
                wake_s = _wake_s(rate, points, lookahead_s)
                if not math.isnan(wake_s):
                    wake_s = max(max(0.0, wake_s), now_s + EPSILON_S)
                    if change_s <= now_s - RATE_WINDOW_S:
                        change_s = _next_change_s(trace, now_s - RATE_WINDOW_S)
                    settled_s = max(change_s - RATE_WINDOW_S, now_s) + RATE_WINDOW_S / 4
                    event_s = min(event_s, wake_s, settled_s)
        if compute_end_s == math.inf and event_s == math.inf:
            return math.inf
        if compute_end_s < event_s:
            now_s = compute_end_s
            compute_end_s = math.inf
            if prefilling:
                return now_s
            k = computing
            times[k, DECODE_START], times[k, DECODE_END] = compute_start_s, now_s
            if levels[k] == TEXT:
                _learn(learned, recompute_spread, recompute_s[k], now_s - compute_start_s)
            else:
                _learn(learned, decode_spread, decode_s[k, levels[k]], now_s - compute_start_s)
            computing = NO_CHUNK
            done += 1
            continue
        now_s = event_s
        k = arrived
        if not seen:
            seen = True
            times[k, FIRST_BYTE] = first_s
            _clear(rate)
            rate[SIZE], rate[FIRST] = chunk_bytes[k], first_s
            rate[BURST_UNTIL] = first_s + BURST_S if first_s > last_end_s + BURST_S else 0.0
            points[0, 0], points[0, 1] = first_s, 0.0
            rate[TAIL] = 1.0
        if now_s < last_s:
            received[k] = min(int(_bytes_between(trace, first_s, now_s, k)), chunk_bytes[k] - 1)
            points = _add(rate, points, now_s, received[k])
            continue
        received[k] = chunk_bytes[k]
        times[k, LAST_BYTE] = last_s
        elapsed_s = max(last_s - max(times[k, REQUEST], last_end_s), 1e-9)
        goodput = chunk_bytes[k] * 8 / elapsed_s
        if levels[k] != TEXT:
            points = _add(rate, points, last_s, chunk_bytes[k])
            found = _window_rate(rate, points) if _is_known(rate, points) else math.nan
            rate[KNOWN] = goodput if math.isnan(found) else 8.0 * found
            goodputs[n_goodputs] = goodput
            n_goodputs += 1
        _clear(rate)
        last_end_s = last_s
        come += sizes[k, 0]
        arrived += 1
        on_link, seen, event_s = False, False, math.inf


@_jit
def sessions(rule, context, costs, traces, which, setting, deadlines_s, priors_bps, factors, out):
    """Many sessions. `traces` holds all traces end to end (edges, bits, rates, first row of each, ends, per_chunk);
    `which` names each session's. `out`: (TTFT, levels, times, reasons), a row per session; times and reasons have one
    row only where they are not asked for."""
    edges, bits, rates, firsts, ends, per_chunk = traces
    depth, overlap, concurrent, rtts_s, manifest_bytes = setting
    decode_by, recompute_by, prefill_by = factors
    ttft_s, levels, times, reasons = out
    points = np.empty((64, 2))
    for s in range(len(ttft_s)):
        at = which[s]
        row, end = firsts[at], firsts[at + 1]
        trace = (edges[row + at : end + at + 1], bits[row + at : end + at + 1], rates[row:end], ends[at], per_chunk[at])
        one = (deadlines_s[s], depth, overlap, priors_bps[s], concurrent, rtts_s[s], manifest_bytes)
        f = s % len(prefill_by)
        by = (decode_by[f], recompute_by[f], prefill_by[f])
        full = s % len(times)
        ttft_s[s] = _session(rule, context, costs, trace, one, by, levels[s], times[full], reasons[full], points)
