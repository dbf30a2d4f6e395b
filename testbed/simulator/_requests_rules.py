"""Compiled: what sessions that share a link choose, from the arrays of `_requests_loop`.

`kvstream` is `kvstream.policies.kvstream` operation by operation; the other rules are `_kernel`'s. Not cached by
itself: the loop that calls it is (`_requests_loop`).
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

import math

import numba
import numpy as np

from kvstream.policies.estimators import BURST_S, MIN_BYTES, SAMPLE_BYTES, SAMPLE_S
from kvstream.policies.kvstream import FAIR, GUESS, PRIOR_WEIGHT, WEIGHTS

TEXT = -1
NONE = -1

jit = numba.njit(nogil=True)


@jit
def flight_sample(one, chunk, transfers, now_s, rtt_s):
    """`estimators.flight_sample`: (bits, seconds), zeros where that is None."""
    k = one.flow
    if k < 0 or chunk[k].level == TEXT:
        return 0.0, 0.0
    free_s = transfers[one.arrived - 1].end_s if one.arrived else 0.0
    begin_s = max(chunk[k].first_s if one.seen else chunk[k].request_s + rtt_s, free_s)
    size = chunk[k].received - one.burst_bytes
    if now_s - begin_s < SAMPLE_S - 1e-9 or size < SAMPLE_BYTES:
        return 0.0, 0.0
    return size * 8.0, now_s - max(begin_s, one.burst_end_s)


@jit
def goodputs(one, chunk, transfers, now_s, rtt_s, found):
    """`estimators.goodputs` into `found`; returns how many."""
    n, bits, seconds = 0, 0.0, 0.0
    for i in range(one.arrived):
        done = transfers[i]
        if done.level != TEXT:
            before, bits = bits, done.bytes * 8.0
            before_s, seconds = seconds, bits / max(done.goodput_bps, 1e-9)
            is_short = seconds < SAMPLE_S and before_s > 0.0
            found[n] = (before + bits) / (before_s + seconds) if is_short else done.goodput_bps
            n += 1
    if n == 0:
        bits, seconds = flight_sample(one, chunk, transfers, now_s, rtt_s)
        if bits > 0.0:
            found[0] = bits / seconds
            n = 1
    return n


@jit
def _link_samples(one, chunk, transfers, now_s, rtt_s, found):
    """`estimators.link_samples` into `found` [sample, (bits, seconds)]; returns how many."""
    least = 0
    for i in range(one.arrived):
        if transfers[i].level != TEXT and transfers[i].bytes >= MIN_BYTES:
            least = MIN_BYTES
    n, free_s = 0, 0.0
    for i in range(one.arrived):
        done = transfers[i]
        begin_s, pause_s, free_s = max(done.first_s, free_s), done.first_s - free_s, done.end_s
        seconds, bits = done.end_s - begin_s, done.bytes * 8.0
        if done.level == TEXT or done.bytes < least:
            continue
        if pause_s > BURST_S:
            if seconds < SAMPLE_S:
                seconds += BURST_S
            else:
                bits -= done.burst_bytes * 8.0
                seconds = done.end_s - max(begin_s, done.burst_end_s)
        elif n and (seconds < BURST_S or max(seconds, found[n - 1, 1]) < SAMPLE_S):
            n -= 1
            bits, seconds = found[n, 0] + bits, found[n, 1] + seconds
        if seconds > 0.0:
            found[n, 0], found[n, 1] = bits, seconds
            n += 1
    bits, seconds = flight_sample(one, chunk, transfers, now_s, rtt_s)
    if bits > 0.0:
        found[n, 0], found[n, 1] = bits, seconds
        n += 1
    return n


@jit
def kvstream(ours, one, chunk, transfers, tables, seen, samples):
    """(level, chunk) of `KVStream.choose`; the remaining chunks are [low, high). Compute takes its estimate: there is
    no spread here."""
    target, memory, spread, margin_s = ours
    size, decode_s, recompute_s = tables
    now_s, deadline_s, low, high, waiting, backlog_s, prefill_s, rtt_s, flying, concurrent = seen
    left_s = deadline_s - now_s

    # _belief
    n = _link_samples(one, chunk, transfers, now_s, rtt_s, samples)
    rate, rate_spread = 0.0, 0.0
    if n:
        keep_s = memory * deadline_s
        bits = seconds = squares = 0.0
        for i in range(n):
            if i:
                squares += math.log(samples[i, 0] * seconds / (samples[i, 1] * bits)) ** 2
            fade = 0.5 ** (samples[i, 1] / keep_s)
            bits, seconds = bits * fade + samples[i, 0], seconds * fade + samples[i, 1]
        rate_spread = math.sqrt((PRIOR_WEIGHT * spread**2 + squares) / (PRIOR_WEIGHT + n - 1))
        rate = bits / seconds

    # _cases, of which all are equal here
    remaining = high - low
    case_s = left_s - margin_s - concurrent * prefill_s
    free_s = case_s - max(concurrent * backlog_s / concurrent, rtt_s)
    recomputing, decoding = np.zeros(remaining + 1), np.zeros(remaining + 1)
    for k in range(remaining):
        recomputing[k + 1] = recomputing[k] + recompute_s[low + k]
        decoding[k + 1] = decoding[k] + decode_s[low + k, -1]
    room = remaining
    while room and concurrent * recomputing[room] + (decoding[remaining] - decoding[room]) > free_s:
        room -= 1
    if concurrent > 1 and room < remaining:
        room = 0

    # _texts
    texts = room
    if n and room:
        with_texts = _in_time(rate, rate_spread, case_s, _lowest(tables, seen, room), room, rtt_s, flying)
        without = _in_time(rate, rate_spread, case_s, _lowest(tables, seen, 0), 0, rtt_s, flying)
        if with_texts < target * max(with_texts, without):
            texts = 0

    if texts:
        if n:
            dry = backlog_s < rtt_s + (waiting + size[high - 1, -1]) * 8.0 / rate
        else:
            dry = backlog_s <= rtt_s
        if texts == remaining or dry:
            return TEXT, low
    back = high - 1
    if n == 0:
        needed = _needed_bps(case_s, _lowest(tables, seen, 0), 0, rtt_s, flying)
        if needed == math.inf:
            return 0, back
        rate, rate_spread = GUESS * needed, spread

    # _level
    texts = min(texts, remaining - 1)
    least = _in_time(rate, rate_spread, case_s, _plan(tables, seen, texts, 0, 0), texts, rtt_s, flying)
    for level in range(size.shape[1] - 1, 0, -1):
        chance = _in_time(rate, rate_spread, case_s, _plan(tables, seen, texts, level, 0), texts, rtt_s, flying)
        if chance > 0.0 and chance >= target * least:
            evenly = _plan(tables, seen, texts, level, level)
            if _in_time(rate, rate_spread, case_s, evenly, texts, rtt_s, flying) >= FAIR * least:
                return level, back
    return 0, back


@jit
def _lowest(tables, seen, texts):
    """`kvstream.lowest` as (bytes, number of smaller chunks, their bytes, of larger ones, their bytes, compute_s,
    last_s)."""
    size, decode_s, recompute_s = tables
    _, _, low, high, waiting, backlog_s, _, _, _, _ = seen
    nbytes, decoding, recomputing = 0, 0.0, 0.0
    for k in range(low + texts, high):
        nbytes += size[k, 0]
        decoding += decode_s[k, 0]
    for k in range(low, low + texts):
        recomputing += recompute_s[k]
    count = high - low - texts
    last_s = decode_s[high - 1, 0] if count else 0.0
    return waiting + nbytes, count, float(nbytes), 0, 0.0, backlog_s + decoding + recomputing, last_s


@jit
def _plan(tables, seen, texts, level, others):
    """The plan of `chance_of` in `KVStream._level`, in the form of `_lowest`."""
    size, decode_s, recompute_s = tables
    _, _, low, high, waiting, backlog_s, _, _, _, _ = seen
    own, more, recomputing, decoding = size[high - 1, level], 0, 0.0, 0.0
    for k in range(low, low + texts):
        recomputing += recompute_s[k]
    for k in range(low + texts, high - 1):
        more += size[k, others]
        decoding += decode_s[k, others]
    count = high - 1 - low - texts
    compute_s = backlog_s + recomputing + decode_s[high - 1, level]
    if count == 0:
        return waiting + own, 1, float(own), 0, 0.0, compute_s, decode_s[high - 1, level]
    last_s = decode_s[low + texts, others]
    if own < more / count:
        return waiting + own + more, 1, float(own), count, float(more), compute_s + decoding, last_s
    return waiting + own + more, count, float(more), 1, float(own), compute_s + decoding, last_s


@jit
def _in_time(rate, spread, case_s, plan, texts, rtt_s, flying):
    """`kvstream.in_time`, where all cases are equal and have room for the texts."""
    found = 0.0
    if plan[5] <= case_s:
        needed = _needed_bps(case_s, plan, texts, rtt_s, flying)
        if needed < math.inf:
            scale = 1.0 / (spread * math.sqrt(2.0))
            for weight in WEIGHTS:
                found += 0.5 * weight * math.erfc(scale * math.log(needed / rate))
    return found


@jit
def _needed_bps(case_s, plan, texts, rtt_s, flying):
    """`kvstream.needed_bps`."""
    total, small, small_bytes, large, large_bytes, _, last_s = plan
    left_s = case_s - last_s - (texts + (not flying)) * rtt_s
    nbytes = float(total)
    if small and left_s > 0.0 and small_bytes / small * left_s < rtt_s * nbytes:
        left_s -= small * rtt_s
        nbytes -= small_bytes
        if large and left_s > 0.0 and large_bytes / large * left_s < rtt_s * nbytes:
            left_s -= large * rtt_s
            nbytes -= large_bytes
    return 8.0 * max(nbytes, 1.0) / left_s if left_s > 0.0 else math.inf
