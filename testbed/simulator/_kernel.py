"""The compiled loop of sessions under built-in policies: session, driver and fluid link, in the same arithmetic.

Every function mirrors one of the Python modules that it names, operation by operation, so that results are the same to
the last bit; `tests/testbed/simulator/test_compiled.py` compares them. What is chosen is in `_rules`; in what is left
out (cancelling, slow start, clairvoyance) these policies have no part. Chunks are taken from the front or the back, so
that those to come are a range, and arrive in the order in which they were requested. Plain tuples in signatures,
because numba's cache breaks with a class when it is renamed. The cache notices changes in this file only; `_SOURCES`
tells it of the others.
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numba
import numpy as np

from kvstream.policies import estimators
from kvstream.policies import kvstream as default
from kvstream.policies.estimators import BURST_S, SAMPLE_BYTES, SAMPLE_S
from kvstream.testbed.session import arrival_rate, estimates, session
from kvstream.testbed.session.arrival_rate import RATE_WINDOW_S
from kvstream.testbed.session.estimates import LARGEST, OVERRUN
from kvstream.testbed.session.session import LOOKAHEAD_MARGIN_S
from kvstream.testbed.simulator import _rules, simulator
from kvstream.testbed.simulator._rules import (
    KVSTREAM,
    TEXT,
    add_goodput,
    choose,
    flight_sample,
    jit,
    kvstream,
    link_samples,
)
from kvstream.testbed.simulator.simulator import EPSILON_S
from kvstream.traces import fluid
from kvstream.traces.fluid import (
    FRAME_BYTES,
    FRAMES_PER_ANSWER,
    FRAMES_PER_LARGE_ANSWER,
    LARGE_FRAME_BYTES,
    MIN_FRAME_BYTES,
)

LOOP, HOLD, STOP = range(3)
"""Ends of a trace."""
REQUEST, FIRST_BYTE, LAST_BYTE, DECODE_START, DECODE_END = range(5)
"""Columns of a chunk's times."""
WAITS, BEGUN, COMPUTED = range(3)
"""Stages of a chunk's computing."""
NO_CHUNK = -1
KNOWN, SIZE, FIRST, BURST_UNTIL, BURST_END, BURST_BYTES, HEAD, TAIL = range(8)
"""Fields of the state of `ArrivalRate`; its points are rows HEAD to TAIL of an array."""


def sources(*modules):
    """A hash of the files of modules: numba's cache of a loop in one file notices no change in another, of which it
    holds code or constants."""
    return hashlib.sha256(b"".join(Path(one.__file__).read_bytes() for one in modules)).hexdigest()


BENEATH = (_rules, default, estimators, arrival_rate, estimates, session, simulator, fluid)
_SOURCES = sources(*BENEATH)


def jit_cached(function):
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return jit(function)


# --- kvstream.traces.trace, for one trace: (edges, bits, rates, end, per_chunk)


@jit
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


@jit
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


@jit
def _divmod(value, by):
    """Python's of two floats that are not negative."""
    mod = np.fmod(value, by)
    quotient = (value - mod) / by
    floor = np.floor(quotient)
    if quotient - floor > 0.5:
        floor += 1.0
    return floor, mod


@jit
def _bits_within(trace, t_s):
    edges, bits, rates, _, _ = trace
    row = _right_of(edges, t_s) - 1
    return bits[-1] if row >= len(rates) else bits[row] + rates[row] * (t_s - edges[row])


@jit
def _bits_by(trace, t_s):
    edges, bits, rates, end, _ = trace
    length = edges[-1]
    if t_s >= length:
        if end == LOOP:
            passes, t_s = _divmod(t_s, length)
            return passes * bits[-1] + _bits_within(trace, t_s)
        return bits[-1] + (rates[-1] * (t_s - length) if end == HOLD else 0.0)
    return _bits_within(trace, t_s)


@jit
def _when(trace, target):
    edges, bits, rates, _, _ = trace
    row = _left_of(bits, target, 0) - 1
    return edges[row] + (target - bits[row]) / rates[row]


@jit
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


@jit
def _chunk_rate(trace, chunk):
    rates, end = trace[2], trace[3]
    n = len(rates)
    if chunk >= n and end == STOP:
        return 0.0
    return rates[chunk % n if end == LOOP else min(chunk, n - 1)]


# --- kvstream.traces.fluid


@jit
def frame_bytes(size):
    small = min(FRAME_BYTES, max(MIN_FRAME_BYTES, size // FRAMES_PER_ANSWER))
    return max(small, min(LARGE_FRAME_BYTES, size // FRAMES_PER_LARGE_ANSWER))


@jit
def _serve(trace, bits, start_s, chunk):
    if not trace[4]:
        return _time_for(trace, bits, start_s)
    rate = _chunk_rate(trace, chunk)
    return bits / rate if rate > 0.0 else math.inf if bits > 0.0 else 0.0


@jit
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


@jit
def _bytes_between(trace, start_s, end_s, chunk):
    if trace[4]:
        return _chunk_rate(trace, chunk) * (end_s - start_s) / 8.0
    return (_bits_by(trace, end_s) - _bits_by(trace, start_s)) / 8.0


@jit
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


@jit
def _clear(rate):
    rate[HEAD] = rate[TAIL] = 0.0
    rate[BURST_END] = rate[BURST_BYTES] = 0.0


@jit
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


@jit
def _window_rate(rate, points):
    head, tail = int(rate[HEAD]), int(rate[TAIL])
    if tail - head < 2:
        return math.nan
    t0, b0 = points[head, 0], points[head, 1]
    t1, b1 = points[tail - 1, 0], points[tail - 1, 1]
    return (b1 - b0) / (t1 - t0) if b1 > b0 and t1 > t0 else math.nan


@jit
def _is_known(rate, points):
    head, tail = int(rate[HEAD]), int(rate[TAIL])
    if tail == head:
        return False
    last_s, received = points[tail - 1, 0], points[tail - 1, 1]
    return last_s - rate[FIRST] >= SAMPLE_S - 1e-9 and received - rate[BURST_BYTES] >= SAMPLE_BYTES


@jit
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


@jit
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


# --- kvstream.testbed.session.estimates: what was learned is (weight, sum); a spread is (shared, own variance that one
# learns with, weight of one step, own)


@jit
def _learn(learned, spread, expected_s, took_s):
    shared, own, weight, _ = spread
    if shared == 0.0 or not expected_s > 0.0:
        return
    far = math.log(max(took_s, 1e-9) / expected_s)
    learned[1] += shared * min(max(far, -LARGEST), LARGEST) / own
    learned[0] += weight


@jit
def _factor(learned, shared):
    return math.exp(shared * (learned[1] / learned[0])) if learned[1] != 0.0 else 1.0


@jit
def _spread_of(learned, spread):
    """Of a step to come."""
    shared, own = spread[0], spread[3]
    return math.sqrt(shared**2 * (1.0 / learned[0]) + own**2)


# --- kvstream.testbed.session.session and kvstream.testbed.simulator.simulator


@jit
def _next_compute(arrived, first, front, order, stage, levels):
    """Which of the chunks that have arrived is computed next, by its place in `order`: text needs all chunks before
    it, and those before `front` are there. -1 if none can be."""
    for at in range(first, arrived):
        k = order[at]
        if stage[k] == WAITS and (levels[k] != TEXT or front >= k):
            return at
    return -1


@jit
def _session(rule, context, costs, trace, setting, factors, levels, times, reasons, room):
    """One session: the time of its first token, inf if the link carries nothing more; fills in what happened to each
    chunk. `room` is for what is kept of each chunk, for samples, and for the rate's window."""
    sizes, text_bytes, decode_s, recompute_s, can_recompute, _ = context
    prefill_s, decode_spread, recompute_spread, prefill_spread, bytes_left = costs
    deadline_s, depth, overlap, prior_bps, concurrent, rtt_s, manifest_bytes = setting
    decode_by, recompute_by, prefill_by = factors
    chunks, seen_of, samples, goodputs, rate, learned, points = room
    order, stage, received, chunk_bytes = chunks
    """By place in the order of requests: which chunk. By chunk: its stage, bytes of it that are here, bytes of it."""
    done_level, done_bytes, done_first_s, done_end_s, done_burst_bytes, done_burst_end_s = seen_of
    """Of the chunks that have arrived, in their order: what the estimators look at."""
    n, is_default = len(sizes), rule[0] == KVSTREAM
    ours = rule[11], rule[12], rule[13], rule[3]
    lookahead_s = rtt_s + LOOKAHEAD_MARGIN_S
    rate[:] = 0.0
    rate[KNOWN] = prior_bps
    learned[0], learned[1] = 1.0, 0.0
    stage[:n] = WAITS
    received[:n] = 0
    n_goodputs, before = 0, (0.0, 0.0)
    now_s = _answer(trace, rtt_s, manifest_bytes, manifest_bytes, 0)[2] if manifest_bytes else rtt_s
    free_at_s = now_s if manifest_bytes else 0.0
    low, high, front = 0, n, 0
    """Chunks that are still to be requested; all before `front` are computed."""
    requested = placed = arrived = begun = done = 0
    """So many were requested, put on the link, received, begun to be computed before any that was not, computed."""
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
            for at in range(begun, requested):
                k = order[at]
                if stage[k] == WAITS:
                    backlog_s += recompute_s[k] * recompute if levels[k] == TEXT else decode_s[k, levels[k]] * decode
            if computing >= 0:
                k, had_s = computing, now_s - compute_start_s
                expected_s = recompute_s[k] * recompute if levels[k] == TEXT else decode_s[k, levels[k]] * decode
                backlog_s += max(expected_s - had_s, OVERRUN * had_s)
            for at in range(arrived, requested):
                k = order[at]
                waiting += chunk_bytes[k] - received[k]
                partly += sizes[k, 0] * received[k] / chunk_bytes[k]
            now_prefill_s = _factor(learned, prefill_spread[0]) * prefill_s
            sample = 0.0, 0.0
            if flying > 0 and (is_default or n_goodputs == 0):
                k = order[arrived]
                begin_s = first_s if seen else times[k, REQUEST] + rtt_s
                sample = flight_sample(
                    levels[k], received[k], int(rate[BURST_BYTES]), rate[BURST_END], begin_s, last_end_s, now_s
                )
            if is_default:
                found = link_samples(
                    done_level, done_bytes, done_first_s, done_end_s, done_burst_bytes, done_burst_end_s, arrived,
                    sample, samples,
                )  # fmt: skip
                spreads = (
                    decode, recompute, _spread_of(learned, decode_spread), _spread_of(learned, recompute_spread),
                    _spread_of(learned, prefill_spread),
                )  # fmt: skip
                observed = (
                    now_s, deadline_s, low, high, waiting, backlog_s, now_prefill_s, rtt_s, flying > 0, concurrent,
                    prior_bps,
                )  # fmt: skip
                tables = sizes, decode_s, recompute_s, can_recompute
                level, k = kvstream(ours, samples[:found], tables, spreads, observed, reasons)
            else:
                n_rates = n_goodputs
                if n_goodputs == 0:
                    if sample[0] > 0.0:
                        goodputs[0], n_rates = sample[0] / sample[1], 1
                    elif not math.isnan(prior_bps):
                        goodputs[0], n_rates = prior_bps, 1
                observed = (
                    now_s, deadline_s, low, waiting, come + partly, backlog_s, decode, recompute, now_prefill_s,
                    concurrent,
                )  # fmt: skip
                level = choose(rule, context, observed, goodputs[:n_rates], bytes_left, reasons[low])
                k = low
            if k == low:
                low += 1
            else:
                high -= 1
            order[requested] = k
            levels[k] = level
            chunk_bytes[k] = text_bytes[k] if level == TEXT else sizes[k, level]
            times[k, REQUEST] = now_s
            requested += 1
        if computing == NO_CHUNK and not prefilling:
            at = _next_compute(arrived, begun, front, order, stage, levels) if overlap or arrived == n else -1
            if at >= 0:
                computing, compute_start_s = order[at], now_s
                k = computing
                if levels[k] == TEXT:
                    compute_end_s = now_s + recompute_by[k] * recompute_s[k]
                else:
                    compute_end_s = now_s + decode_by[k] * decode_s[k, levels[k]]
                stage[k] = BEGUN
                while begun < arrived and stage[order[begun]] != WAITS:
                    begun += 1
            elif done == n:
                prefilling = True
                compute_end_s = now_s + prefill_by * prefill_s
        # _Driver.run
        if not on_link:
            if placed < requested:
                k = order[placed]
                size = chunk_bytes[k]
                fine = depth > 1 and size > MIN_FRAME_BYTES
                start_s = times[k, REQUEST] + rtt_s
                if start_s < free_at_s:
                    start_s = free_at_s
                frame = frame_bytes(size) if fine else size
                first_s, event_s, last_s = _answer(trace, start_s, size, frame, k)
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
            stage[k] = COMPUTED
            while front < n and stage[front] == COMPUTED:
                front += 1
            done += 1
            continue
        now_s = event_s
        k = order[arrived]
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
            found_bps = _window_rate(rate, points) if _is_known(rate, points) else math.nan
            rate[KNOWN] = goodput if math.isnan(found_bps) else 8.0 * found_bps
            before = add_goodput(goodputs, n_goodputs, before, chunk_bytes[k], goodput)
            n_goodputs += 1
        if is_default:
            done_level[arrived], done_bytes[arrived] = levels[k], chunk_bytes[k]
            done_first_s[arrived], done_end_s[arrived] = first_s, last_s
            done_burst_bytes[arrived], done_burst_end_s[arrived] = int(rate[BURST_BYTES]), rate[BURST_END]
        _clear(rate)
        last_end_s = last_s
        come += sizes[k, 0]
        arrived += 1
        on_link, seen, event_s = False, False, math.inf


def _many(sources):
    """`sources` is in the closure for numba's cache, which looks at a function and what it closes over."""

    def sessions(rule, context, costs, traces, which, setting, deadlines_s, priors_bps, factors, out):
        """Many sessions. `traces` holds all traces end to end (edges, bits, rates, first row of each, ends, per_chunk);
        `which` names each session's. `out`: (TTFT, levels, times, reasons), a row per session; times and reasons have
        one row only where they are not asked for."""
        edges, bits, rates, firsts, ends, per_chunk = traces
        depth, overlap, concurrent, rtts_s, manifest_bytes = setting
        decode_by, recompute_by, prefill_by = factors
        ttft_s, levels, times, reasons = out
        n = len(context[0])
        if len(sources) == 0:  # never; what is not used is not in the closure
            return
        whole, real = np.empty((6, n), np.int64), np.empty((4, n))
        room = (
            (whole[0], whole[1], whole[2], whole[3]),
            (whole[4], whole[5], real[0], real[1], np.empty(n, np.int64), real[2]),
            np.empty((n + 1, 2)),
            np.empty(n + 1),
            np.empty(8),
            np.empty(2),
            np.empty((64, 2)),
        )
        for s in range(len(ttft_s)):
            at = which[s]
            row, end = firsts[at], firsts[at + 1]
            trace = (
                edges[row + at : end + at + 1], bits[row + at : end + at + 1], rates[row:end], ends[at], per_chunk[at]
            )  # fmt: skip
            one = (deadlines_s[s], depth, overlap, priors_bps[s], concurrent, rtts_s[s], manifest_bytes)
            f = s % len(prefill_by)
            by = (decode_by[f], recompute_by[f], prefill_by[f])
            full = s % len(times)
            ttft_s[s] = _session(rule, context, costs, trace, one, by, levels[s], times[full], reasons[full], room)

    return jit_cached(sessions)


sessions = _many(_SOURCES)
