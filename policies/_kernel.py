"""The compiled loops of the optimum: the first steps, the ascent of the prices and the search, in the same arithmetic.

Every function mirrors one of `line`, `states`, `relaxation` and `optimum`, operation by operation and with the same
order among equals, so that plans are the same to the last bit; `tests/policies/test_kernel.py` compares them. States
are tuples of arrays, in the order of `states.States`; `line`, `link` and `bound` are the `tables` of `Line`, `TrueLink`
and `Bound`. One file, because numba's cache notices changes in this file only. Importing it compiles what is called
from elsewhere, some seconds where that has not been done before.
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

import math

import numba
import numpy as np
from numba import types

from kvstream.policies.relaxation import ASCENT_STEPS, SAMPLE

NUMBER, VECTOR, TABLE = types.float64, types.float64[::1], types.float64[:, ::1]
LINE = types.Tuple((TABLE, TABLE, TABLE, TABLE, NUMBER, NUMBER))
LINK = types.Tuple((types.bool_, types.bool_, VECTOR, VECTOR, VECTOR, VECTOR, types.int64, NUMBER, NUMBER))
BOUND = types.Tuple((TABLE, TABLE, TABLE, TABLE, TABLE, VECTOR, TABLE))


def _jit(function, *signature):
    try:
        return numba.njit(*signature, nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.njit(*signature, nogil=True)(function)


def _called_with(*types_of_arguments):
    """For what is called from elsewhere: compiled at once, and once only."""
    return lambda function: _jit(function, types_of_arguments)


# --- kvstream.policies.line: the link


@_jit
def _interpolated(x, xs, ys, beyond):
    """numpy.interp, with a value for what lies beyond the last of `xs`."""
    last = len(xs) - 1
    if x > xs[last]:
        return beyond
    if x < xs[0]:
        return ys[0]
    row = np.searchsorted(xs, x, side="right") - 1
    if row == last or xs[row] == x:
        return ys[row]
    slope = (ys[row + 1] - ys[row]) / (xs[row + 1] - xs[row])
    return slope * (x - xs[row]) + ys[row]


@_jit
def _at(link, t_s):
    edges, bits = link[2], link[3]
    return 0.0 if link[0] else _interpolated(t_s, edges, bits, bits[-1])


@_jit
def _send(link, start_s, position, size, k):
    per_chunk, flows, edges, bits, rates, seconds_per_bit = link[:6]
    if per_chunk:
        return start_s + size * seconds_per_bit[k], position
    end = position + size
    if flows:
        return _interpolated(end, bits, edges, math.inf), end
    row = np.searchsorted(bits, end, side="left") - 1
    if row >= len(rates):
        return math.inf, end
    row = max(row, 0)
    rate = rates[row] if rates[row] > 0.0 else 1.0
    return edges[row] + (end - bits[row]) / rate, end


@_jit
def _next_start(link, start_s, position, frame, end_s, end_position, k):
    depth, rtt_s = link[6:8]
    if rtt_s == 0.0:
        return end_s, end_position
    if depth == 1:
        begin_s = end_s + rtt_s
        return begin_s, _at(link, begin_s)
    begin_s = max(end_s, _send(link, start_s, position, frame, k)[0] + rtt_s)
    return begin_s, _at(link, begin_s) if begin_s > end_s else end_position


# --- kvstream.policies.states


@_jit
def _first(line, link):
    (start_s, free_s), none = line[4:], np.zeros(1, np.intp)
    return np.full(1, start_s), np.full(1, _at(link, start_s)), np.full(1, free_s), np.zeros(1), none, none


@_jit
def _taken(states, index):
    start_s, position, free_s, loss, parent, option = states
    return start_s[index], position[index], free_s[index], loss[index], parent[index], option[index]


@_jit
def _expand(line, link, states, k, below, free_by_s):
    bits, frames, compute, losses = line[:4]
    n_chunks, m = bits.shape
    most = len(states[0]) * m
    starts_s, positions, frees_s, lost = np.empty(most), np.empty(most), np.empty(most), np.empty(most)
    parents, options = np.empty(most, np.intp), np.empty(most, np.intp)
    n = 0
    for parent in range(len(states[0])):
        start_s, position = states[0][parent], states[1][parent]
        for option in range(m):
            loss = states[3][parent] + losses[k, option]
            if not loss < below:
                continue
            end_s, end_position = _send(link, start_s, position, bits[k, option], k)
            free_s = max(end_s, states[2][parent]) + compute[k, option]
            if not (free_s <= free_by_s and free_s < math.inf):
                continue
            if k < n_chunks - 1:
                end_s, end_position = _next_start(link, start_s, position, frames[k, option], end_s, end_position, k)
            starts_s[n], positions[n], frees_s[n], lost[n] = end_s, end_position, free_s, loss
            parents[n], options[n] = parent, option
            n += 1
    return starts_s[:n], positions[:n], frees_s[:n], lost[:n], parents[:n], options[:n]


@_jit
def _comes_before(one, other, start_s, free_s, loss):
    if start_s[one] != start_s[other]:
        return start_s[one] < start_s[other]
    if free_s[one] != free_s[other]:
        return free_s[one] < free_s[other]
    if loss[one] != loss[other]:
        return loss[one] < loss[other]
    return one < other


@_jit
def _sorted(states, m):
    """Indices by start, free and loss, as lexsort gives them.

    States with the same of `m` options are mostly in order, since their parents are; such runs are merged, two by two.
    """
    start_s, free_s, loss, options = states[0], states[2], states[3], states[5]
    n, runs = 0, 2
    order, merged = np.empty(len(options), np.intp), np.empty(len(options), np.intp)
    for option in range(m):
        for state in range(len(options)):
            if options[state] == option:
                order[n] = state
                n += 1
    while runs > 1:
        runs, low = 0, 0
        while low < n:
            middle = low + 1
            while middle < n and _comes_before(order[middle - 1], order[middle], start_s, free_s, loss):
                middle += 1
            high = min(middle + 1, n)
            while high < n and _comes_before(order[high - 1], order[high], start_s, free_s, loss):
                high += 1
            left, right = low, middle
            for at in range(low, high):
                if right == high or (left < middle and _comes_before(order[left], order[right], start_s, free_s, loss)):
                    merged[at] = order[left]
                    left += 1
                else:
                    merged[at] = order[right]
                    right += 1
            low = high
            runs += 1
        order, merged = merged, order
    return order


@_jit
def _soonest(states, m):
    order = _sorted(states, m)
    free_s, kept, n = math.inf, np.empty(len(order), np.intp), 0
    for state in order:
        if states[2][state] < free_s:
            free_s = states[2][state]
            kept[n] = state
            n += 1
    return _taken(states, kept[:n])


@_jit
def _undominated(states, arrival_s, m):
    order, kept, n = _sorted(states, m), np.empty(len(states[0]), np.intp), 0
    stair_free, stair_loss, size = np.empty(len(order)), np.empty(len(order)), 0
    least = math.inf
    for state in order:
        free_s, loss = states[2][state], states[3][state]
        if not loss < least:
            continue
        if free_s <= arrival_s[state]:
            least = loss
        at = np.searchsorted(stair_free[:size], free_s, side="right")
        if at > 0 and stair_loss[at - 1] <= loss:
            continue
        kept[n] = state
        n += 1
        end = at
        while end < size and stair_loss[end] >= loss:
            end += 1
        if end == at:
            for step in range(size, at, -1):
                stair_free[step], stair_loss[step] = stair_free[step - 1], stair_loss[step - 1]
        else:
            for step in range(end, size):
                stair_free[step - end + at + 1], stair_loss[step - end + at + 1] = stair_free[step], stair_loss[step]
        stair_free[at], stair_loss[at] = free_s, loss
        size += 1 - (end - at)
    return kept[:n]


@_jit
def _best(first, second):
    """The state with the least `first`, and among those the least `second`."""
    best = 0
    for state in range(1, len(first)):
        if first[state] < first[best] or (first[state] == first[best] and second[state] < second[best]):
            best = state
    return best


@_jit
def _lowest(values, width):
    """Indices of so many lowest values, in their order; among equals the first."""
    limit = np.sort(values)[width - 1]
    equals = width
    for value in values:
        equals -= value < limit
    kept, n = np.empty(width, np.intp), 0
    for at in range(len(values)):
        if values[at] < limit or (values[at] == limit and equals > 0):
            equals -= values[at] == limit
            kept[n] = at
            n += 1
    return kept


@_jit
def _trace_back(parents, options, state):
    found = np.empty(len(parents), np.intp)
    for k in range(len(parents) - 1, -1, -1):
        found[k] = options[k][state]
        state = parents[k][state]
    return found


# --- kvstream.policies.relaxation


@_called_with(LINE, TABLE, TABLE, VECTOR, VECTOR, NUMBER, NUMBER, NUMBER, NUMBER)
def ascent(line, sent, cost, slope, limit, compute_left, to_beat, unit_c, unit_b):
    compute, loss = line[2:4]
    n, m = cost.shape
    lam, mu = 0.0, np.zeros(n)
    mu[-1] = unit_b
    best_lam, best_mu, best_bound = lam, mu.copy(), -math.inf
    pace, stalled = 1.0, 0
    pick, later, over_b = np.empty(n, np.intp), np.empty(n), np.empty(n)
    for _ in range(ASCENT_STEPS):
        total = 0.0
        for k in range(n - 1, -1, -1):
            total += mu[k]
            later[k] = total - mu[k]
        bound, earlier = 0.0, 0.0
        for k in range(n):
            earlier += mu[k] * slope[k]
            a_second, least = lam + earlier, math.inf
            for o in range(m):
                priced = loss[k, o] + cost[k, o] * later[k] + sent[k, o] * mu[k] + compute[k, o] * a_second
                if priced < least:
                    least, pick[k] = priced, o
            bound += least - mu[k] * limit[k]
        bound -= lam * compute_left
        if bound > best_bound:
            best_lam, best_mu, best_bound, stalled = lam, mu.copy(), bound, 0
        else:
            stalled += 1
            if stalled == 8:
                lam, mu, pace, stalled = best_lam, best_mu.copy(), pace / 2.0, 0
                continue
        left = 0.0
        for k in range(n - 1, -1, -1):
            left += compute[k, pick[k]]
            over_b[k] = slope[k] * left
        over_c, moved, length = left - compute_left, 0.0, 0.0
        if lam == 0.0 and over_c < 0.0:
            over_c = 0.0
        for k in range(n):
            moved += cost[k, pick[k]]
            over_b[k] = moved - cost[k, pick[k]] + sent[k, pick[k]] + over_b[k] - limit[k]
            if mu[k] == 0.0 and over_b[k] < 0.0:
                over_b[k] = 0.0
            length += over_b[k] * unit_b * (over_b[k] * unit_b)
        length += over_c * unit_c * (over_c * unit_c)
        if length == 0.0:
            break
        step = pace * max(to_beat - bound, 0.01 * abs(to_beat)) / length
        lam = max(lam + step * over_c * (unit_c * unit_c), 0.0)
        for k in range(n):
            mu[k] = max(mu[k] + step * over_b[k] * (unit_b * unit_b), 0.0)
    return best_lam, best_mu


@_called_with(types.float64[:, :, ::1], TABLE, TABLE, TABLE, types.bool_[:, ::1])
def count_rests(priced, compute, compute_price, price, heavy):
    sets, n, m = priced.shape
    rest = np.zeros((n, sets))
    for k in range(n):
        for number in range(sets):
            total = 0.0
            for j in range(k, n):
                least = math.inf
                for o in range(m):
                    own = priced[number, j, o] - compute_price[number, k] * compute[j, o]
                    least = min(least, own + price[k, number] * heavy[j, o])
                total += least
            rest[k, number] = total
    return rest


@_jit
def _highest(a, b, c, x, y):
    n, sets = len(x), np.ones(len(a), np.bool_)
    if n > 4 * SAMPLE:
        sets[:] = False
        for sample in range(SAMPLE):
            state = sample * (n - 1) // (SAMPLE - 1)
            best, best_bound = 0, -math.inf
            for number in range(len(a)):
                bound = a[number] * x[state] + b[number] * y[state] + c[number]
                if bound > best_bound:
                    best, best_bound = number, bound
            sets[best] = True
    highest = np.full(n, -math.inf)
    for number in range(len(a)):
        if sets[number]:
            of_compute, of_link, rest = a[number], b[number], c[number]
            for state in range(n):
                bound = of_compute * x[state] + of_link * y[state] + rest
                highest[state] = bound if bound > highest[state] else highest[state]
    return highest


@_jit
def _rest(bound, k, compute_left, position):
    link_price, compute_price, rest, count_price, count_rest, least_s, extra_s = bound
    found = _highest(compute_price[k], link_price[k], rest[k], -compute_left, position)
    if len(count_price) == 0:
        return found
    most = np.searchsorted(extra_s[k, k:], compute_left - least_s[k], side="right").astype(np.float64)
    return np.maximum(found, _highest(count_price[k], link_price[k], count_rest[k], -most, position))


# --- kvstream.policies.optimum


@_jit
def _promising(line, link, bound, states, k, end_s, free_by_s, below):
    start_s, position, free_s, loss = states[:4]
    moved = (start_s if link[0] else position) - link[8]
    bounds = loss + _rest(bound, k, end_s - free_s, moved)
    least_bits = line[0][k, 0]
    for option in range(1, line[0].shape[1]):
        least_bits = min(least_bits, line[0][k, option])
    arrival_s, alive, n = np.empty(len(loss)), np.empty(len(loss), np.intp), 0
    for state in range(len(loss)):
        if bounds[state] < below:
            arrives_s = _send(link, start_s[state], position[state], least_bits, k)[0]
            waits_s = max(free_s[state], arrives_s)
            if waits_s <= free_by_s:
                free_s[state] = waits_s
                arrival_s[n], alive[n] = arrives_s, state
                n += 1
    states = _taken(states, alive[:n])
    kept = _undominated(states, arrival_s[:n], line[0].shape[1])
    return _taken(states, kept), bounds[alive[kept]]


@_called_with(LINE, LINK)
def soonest(line, link):
    """(options, when the last compute ends) of the earliest plan; no options if there is no plan."""
    states = _first(line, link)
    parents, options = [], []
    for k in range(len(line[0])):
        states = _expand(line, link, states, k, math.inf, math.inf)
        if len(states[0]) == 0:
            return states[4], math.inf
        if k < len(line[0]) - 1:
            states = _soonest(states, line[0].shape[1])
        parents.append(states[4])
        options.append(states[5])
    best = _best(states[2], states[3])
    return _trace_back(parents, options, best), states[2][best]


@_called_with(LINE, LINK, BOUND, NUMBER, VECTOR, NUMBER, types.int64)
def search(line, link, bound, end_s, free_by_s, below, width):
    """(options, loss, when the last compute ends, complete) of `optimum._Search.run`; no options if none was found."""
    states, complete = _first(line, link), True
    parents, options = [], []
    for k in range(len(line[0])):
        states = _expand(line, link, states, k, below, free_by_s[k + 1])
        if k < len(line[0]) - 1 and len(states[0]) > 0:
            states, bounds = _promising(line, link, bound, states, k + 1, end_s, free_by_s[k + 1], below)
            if len(bounds) > width:
                complete = False
                states = _taken(states, _lowest(bounds, width))
        if len(states[0]) == 0:
            return states[4], math.inf, math.inf, complete
        parents.append(states[4])
        options.append(states[5])
    best = _best(states[3], states[2])
    return _trace_back(parents, options, best), states[3][best], states[2][best], complete
