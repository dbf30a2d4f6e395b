"""Compiled: what sessions choose, in the loops of sessions and of requests.

Every function mirrors one of `kvstream.policies`, operation by operation. Not cached by itself: the loops that call it
are (`_kernel`, `_requests_loop`).
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

import math
import sys

import numba
import numpy as np

from kvstream.policies.estimators import BURST_S, MIN_BYTES, SAMPLE_BYTES, SAMPLE_S
from kvstream.policies.kvstream import FAIR, GUESS, PRIOR_WEIGHT, ROOT_2, SLOWNESS, WEIGHTS

FIXED, CACHEGEN, THROUGHPUT, BUFFER, KVSTREAM = range(5)
"""Kinds of rules."""
LAST, ARITHMETIC, HARMONIC, SLIDING_MIN = range(4)
"""Estimators of `throughput`."""
PACE, SLACK, BACKLOG = range(3)
"""Buffers of `buffer-based`."""
TEXT = -1
"""A chunk's level."""
N_REASONS = 4
"""Numbers that a choice shows at most."""
SUM_IS_COMPENSATED = sys.version_info >= (3, 12)
"""Since then Python's `sum` of floats is Neumaier's."""

jit = numba.njit(nogil=True)


# --- sums as Python computes them


@jit
def plus(total, rest, value):
    """One step of `sum`: (total, what rounding lost of it)."""
    new = total + value
    if SUM_IS_COMPENSATED:
        if abs(total) >= abs(value):
            rest += (total - new) + value
        else:
            rest += (value - new) + total
    return new, rest


@jit
def total_of(total, rest):
    return total + rest if rest != 0.0 and math.isfinite(rest) else total


@jit
def sum_of(values, first, stop, factor):
    """Of `factor` times each of `values[first:stop]`."""
    total, rest = 0.0, 0.0
    for k in range(first, stop):
        total, rest = plus(total, rest, factor * values[k])
    return total_of(total, rest)


# --- kvstream.policies.estimators


@jit
def flight_sample(level, received, burst_bytes, burst_end_s, first_s, free_s, now_s):
    """(bits, seconds) of what has come of the oldest chunk in flight, zeros where that is too little; it began to
    arrive, or will begin, at `first_s`; the one before it ended at `free_s`."""
    begin_s = max(first_s, free_s)
    size = received - burst_bytes
    if level == TEXT or now_s - begin_s < SAMPLE_S - 1e-9 or size < SAMPLE_BYTES:
        return 0.0, 0.0
    return size * 8.0, now_s - max(begin_s, burst_end_s)


@jit
def add_goodput(found, n, before, nbytes, goodput_bps):
    """A chunk more in the list of `estimators.goodputs`, whose first `n` rates are `found`; `before`, (bits, seconds),
    is the chunk before it. Returns what is `before` for the next one."""
    bits = nbytes * 8.0
    before_bits, before_s = before
    seconds = bits / max(goodput_bps, 1e-9)
    is_short = seconds < SAMPLE_S and before_s > 0.0
    found[n] = (before_bits + bits) / (before_s + seconds) if is_short else goodput_bps
    return bits, seconds


@jit
def link_samples(level, nbytes, first_s, end_s, burst_bytes, burst_end_s, arrived, flying, found):
    """`estimators.link_samples` into `found` [sample, (bits, seconds)]; returns how many. Transfers are the first
    `arrived` of every array; `flying` is the `flight_sample`."""
    least = 0
    for i in range(arrived):
        if level[i] != TEXT and nbytes[i] >= MIN_BYTES:
            least = MIN_BYTES
    n, free_s = 0, 0.0
    for i in range(arrived):
        begin_s, pause_s, free_s = max(first_s[i], free_s), first_s[i] - free_s, end_s[i]
        seconds, bits = end_s[i] - begin_s, nbytes[i] * 8.0
        if level[i] == TEXT or nbytes[i] < least:
            continue
        if pause_s > BURST_S:
            if seconds < SAMPLE_S:
                seconds += BURST_S
            else:
                bits -= burst_bytes[i] * 8.0
                seconds = end_s[i] - max(begin_s, burst_end_s[i])
        elif n and (seconds < BURST_S or max(seconds, found[n - 1, 1]) < SAMPLE_S):
            n -= 1
            bits, seconds = found[n, 0] + bits, found[n, 1] + seconds
        if seconds > 0.0:
            found[n, 0], found[n, 1] = bits, seconds
            n += 1
    if flying[0] > 0.0:
        found[n, 0], found[n, 1] = flying
        n += 1
    return n


# --- the rules that take chunks in order


@jit
def _least(values, first):
    found = values[first]
    for at in range(first + 1, len(values)):
        found = min(found, values[at])
    return found


@jit
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
            total, rest = plus(total, rest, rates[at])
        return total_of(total, rest) / (n - first)
    if _least(rates, first) <= 0.0:
        return 0.0
    for at in range(first, n):
        total, rest = plus(total, rest, 1.0 / rates[at])
    return (n - first) / total_of(total, rest)


@jit
def choose(rule, context, seen, rates, bytes_left, reason):
    """The level for the next chunk by a rule that takes them in order. `reason` takes what it shows for it, nan where
    that is nothing.

    `seen` is the observation: (now, deadline, chunk, waiting bytes, pace: bytes at the lowest level that have come,
    backlog, decode and recompute factors, prefill, requests at once).
    """
    kind, level, told, reserve_s, margin, estimator, window, safety, buffer, reservoir, cushion = rule[:11]
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
    text_s = sum_of(recompute_s, chunk, n_chunks, recompute) if can_recompute else math.inf
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


# --- kvstream.policies.kvstream


@jit
def kvstream(ours, samples, tables, spreads, seen, reasons):
    """(level, chunk) of `KVStream.choose`; the remaining chunks are [low, high). `reasons` [chunk] takes what it shows,
    nan for what it does not.

    `tables`: (bytes and decode seconds by chunk and level, recompute seconds, whether there are any); the seconds as
    estimated now are these times `spreads[:2]`, and `spreads[2:]` are the spreads of decoding, recomputing and prefill.
    `prior_bps` may be nan.
    """
    (target, memory, spread, margin_s), (size, _, recompute_s, can_recompute) = ours, tables
    _, deadline_s, low, high, waiting, backlog_s, _, rtt_s, flying, _, prior_bps = seen
    remaining = high - low
    cases, most = np.empty((len(WEIGHTS), 3)), np.empty(len(WEIGHTS), np.int64)
    n_cases = _cases(margin_s, tables, spreads, seen, cases, most)
    cases, most = cases[:n_cases], most[:n_cases]
    rate, rate_spread = _belief(samples, memory * deadline_s, spread, prior_bps)
    is_known = not math.isnan(rate)

    texts, chance = 0, 0.0
    if can_recompute:
        texts, chance = _texts(target, rate, rate_spread, tables, spreads, seen, cases, most)
    if texts:
        if is_known:
            dry = backlog_s < rtt_s + (waiting + size[high - 1, -1]) * 8.0 / rate
        else:
            dry = backlog_s <= rtt_s
        if texts == remaining or dry:
            _show(reasons[low], math.nan, math.nan, texts, chance)
            return TEXT, low
    back = high - 1 if can_recompute else low
    if not is_known:
        needed = _needed_bps(_lowest(tables, spreads, seen, 0), cases[(n_cases - 1) // 2], rtt_s, int(not flying))
        if needed == math.inf:
            _show(reasons[back], math.nan, math.nan, texts, math.nan)
            return 0, back
        rate, rate_spread = GUESS * needed, spread

    # _level
    given, texts = texts, min(texts, remaining - 1)
    text_s = sum_of(recompute_s, low, low + texts, spreads[1]) if can_recompute else 0.0
    plan = _plan(tables, spreads, seen, texts, text_s, 0, 0)
    least = _in_time(rate, rate_spread, plan, cases, most, texts, rtt_s, flying)
    for level in range(size.shape[1] - 1, 0, -1):
        plan = _plan(tables, spreads, seen, texts, text_s, level, 0)
        chance = _in_time(rate, rate_spread, plan, cases, most, texts, rtt_s, flying)
        if chance > 0.0 and chance >= target * least:
            plan = _plan(tables, spreads, seen, texts, text_s, level, level)
            if _in_time(rate, rate_spread, plan, cases, most, texts, rtt_s, flying) >= FAIR * least:
                _show(reasons[back], rate, rate_spread, given, chance)
                return level, back
    _show(reasons[back], rate, rate_spread, given, least)
    return 0, back


@jit
def _show(reason, estimate_bps, spread, texts, in_time):
    reason[0], reason[1], reason[2], reason[3] = estimate_bps, spread, texts, in_time


@jit
def _belief(samples, keep_s, spread, prior_bps):
    """(median throughput, spread of its logarithm); the prior, or nan, where nothing has been measured."""
    n = len(samples)
    if n == 0:
        return prior_bps, spread
    bits = seconds = squares = 0.0
    for i in range(n):
        if i:
            squares += math.log(samples[i, 0] * seconds / (samples[i, 1] * bits)) ** 2
        fade = np.exp2(-samples[i, 1] / keep_s)
        bits, seconds = bits * fade + samples[i, 0], seconds * fade + samples[i, 1]
    return bits / seconds, math.sqrt((PRIOR_WEIGHT * spread**2 + squares) / (PRIOR_WEIGHT + n - 1))


@jit
def _cases(margin_s, tables, spreads, seen, cases, most):
    """Fills `cases` [case, (weight, left_s, slower)] and `most` [case], the texts that fit; returns how many."""
    _, decode_s, recompute_s, can_recompute = tables
    now_s, deadline_s, low, high, _, backlog_s, prefill_s, rtt_s, _, concurrent, _ = seen
    decode_by, recompute_by, decode_spread, recompute_spread, prefill_spread = spreads
    left_s = deadline_s - now_s - margin_s
    remaining = high - low
    texts = 0
    decoding, recomputing = np.zeros(remaining + 1), np.zeros(remaining + 1)
    if can_recompute:
        texts = remaining
        for k in range(remaining):
            recomputing[k + 1] = recomputing[k] + recompute_by * recompute_s[low + k]
            decoding[k + 1] = decoding[k] + decode_by * decode_s[low + k, -1]
    alike = decode_spread == 0.0 and recompute_spread == 0.0 and prefill_spread == 0.0
    count = 1 if alike else len(WEIGHTS)
    for case in range(count):
        weight, decode, recompute, prefill = 1.0, 1.0, 1.0, 1.0
        if not alike:
            weight, z = WEIGHTS[case], SLOWNESS[case]
            decode, recompute = math.exp(z * decode_spread), math.exp(z * recompute_spread)
            prefill = math.exp(z * prefill_spread)
        recompute *= concurrent
        case_s = left_s - concurrent * prefill * prefill_s
        free_s = case_s - max(recompute * backlog_s / concurrent, rtt_s)
        while texts and recompute * recomputing[texts] + decode * (decoding[-1] - decoding[texts]) > free_s:
            texts -= 1
        if concurrent > 1 and texts < remaining:
            texts = 0
        cases[case, 0], cases[case, 1], cases[case, 2] = weight, case_s, decode
        most[case] = texts
    return count


@jit
def _texts(target, rate, spread, tables, spreads, seen, cases, most):
    """`KVStream._texts`; the cases' texts fall from one to the next."""
    if most[0] == 0:
        return 0, 0.0
    highest = _chance_with(most[0], rate, spread, tables, spreads, seen, cases, most)
    if highest >= target:  # no other chance is so much higher
        return most[0], highest
    options, chances, n = np.empty(len(most) + 1, np.int64), np.empty(len(most) + 1), 1
    options[0], chances[0] = most[0], highest
    for case in range(1, len(most) + 1):
        texts = most[case] if case < len(most) else 0
        if texts < options[n - 1]:
            options[n] = texts
            chances[n] = _chance_with(texts, rate, spread, tables, spreads, seen, cases, most)
            highest = max(highest, chances[n])
            n += 1
    enough = target * highest
    for i in range(n):
        if chances[i] >= enough:
            return options[i], chances[i]
    return 0, 0.0


@jit
def _chance_with(texts, rate, spread, tables, spreads, seen, cases, most):
    if math.isnan(rate):
        total, rest = 0.0, 0.0
        for case in range(len(most)):
            if most[case] >= texts:
                total, rest = plus(total, rest, cases[case, 0])
        return total_of(total, rest)
    rtt_s, flying = seen[7], seen[8]
    return _in_time(rate, spread, _lowest(tables, spreads, seen, texts), cases, most, texts, rtt_s, flying)


@jit
def _lowest(tables, spreads, seen, texts):
    """`kvstream.lowest` as (bytes, number of smaller chunks, mean bytes, of larger ones, mean bytes, compute_s,
    last_s)."""
    size, decode_s, recompute_s, can_recompute = tables
    low, high, waiting, backlog_s = seen[2], seen[3], seen[4], seen[5]
    first, count = low + texts, high - low - texts
    nbytes = 0
    for k in range(first, high):
        nbytes += size[k, 0]
    compute_s = backlog_s + sum_of(decode_s[:, 0], first, high, spreads[0])
    if can_recompute:
        compute_s += sum_of(recompute_s, low, first, spreads[1])
    if count == 0:
        return float(waiting), 0, 0.0, 0, 0.0, compute_s, 0.0
    return float(waiting + nbytes), count, nbytes / count, 0, 0.0, compute_s, spreads[0] * decode_s[high - 1, 0]


@jit
def _plan(tables, spreads, seen, texts, text_s, level, others):
    """The plan of `chance_of` in `KVStream._level`, in the form of `_lowest`."""
    size, decode_s, _, can_recompute = tables
    low, high, waiting, backlog_s = seen[2], seen[3], seen[4], seen[5]
    if can_recompute:
        own_at, first, stop = high - 1, low + texts, high - 1
    else:
        own_at, first, stop = low, low + 1, high
    own, own_s = size[own_at, level], spreads[0] * decode_s[own_at, level]
    compute_s = backlog_s + text_s + own_s
    count = stop - first
    if count <= 0:
        return float(waiting + own), 1, float(own), 0, 0.0, compute_s, own_s
    more = 0
    for k in range(first, stop):
        more += size[k, others]
    compute_s += sum_of(decode_s[:, others], first, stop, spreads[0])
    last_s = spreads[0] * decode_s[first if can_recompute else stop - 1, others]
    nbytes, mean = float(waiting + own + more), more / count
    if own < mean:
        return nbytes, 1, float(own), count, mean, compute_s, last_s
    return nbytes, count, mean, 1, float(own), compute_s, last_s


@jit
def _in_time(rate, spread, plan, cases, most, texts, rtt_s, flying):
    """`kvstream.in_time`."""
    scale = 1.0 / (spread * ROOT_2)
    waits = texts + int(not flying)
    found = 0.0
    for case in range(len(most)):
        if most[case] >= texts and cases[case, 2] * plan[5] <= cases[case, 1]:
            needed = _needed_bps(plan, cases[case], rtt_s, waits)
            if needed < math.inf:
                found += 0.5 * cases[case, 0] * math.erfc(scale * math.log(needed / rate))
    return found


@jit
def _needed_bps(plan, case, rtt_s, waits):
    """`kvstream.needed_bps`."""
    nbytes, small, small_bytes, large, large_bytes, _, last_s = plan
    left_s = case[1] - case[2] * last_s - waits * rtt_s
    if small and left_s > 0.0 and small_bytes * left_s < rtt_s * nbytes:
        left_s -= small * rtt_s
        nbytes -= small * small_bytes
        if large and left_s > 0.0 and large_bytes * left_s < rtt_s * nbytes:
            left_s -= large * rtt_s
            nbytes -= large * large_bytes
    return 8.0 * max(nbytes, 1.0) / left_s if left_s > 0.0 else math.inf
