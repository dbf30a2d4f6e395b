"""The compiled event loop of requests in time: arrivals, caches, links that flows share, sessions, engines.

A session here does what `kvstream.testbed.session.Session` does, on arrays, so that thousands of requests a second can
be simulated; `tests/testbed/simulator/test_requests.py` compares it with `simulator.simulate` and with
`concurrent.simulate_shared`. When a policy, an order or an admission is Python, `advance` returns with the question,
and is called again once the answer stands in the arrays.

Everything of one kind is one array: a record for each slot (a request in service), each chunk of a slot, each link,
each engine. Slot s belongs to engine s // slots. Times of a session count from its request's arrival, all others from
the beginning of the workload. Numba's cache notices changes in this file only; on what others it rests, is told to the
cache by `_SOURCES`.
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

import math

import numpy as np

from kvstream.policies.estimators import BURST_S
from kvstream.testbed.session.arrival_rate import RATE_WINDOW_S
from kvstream.testbed.session.estimates import OVERRUN
from kvstream.testbed.session.session import LOOKAHEAD_MARGIN_S
from kvstream.testbed.simulator import _kernel
from kvstream.testbed.simulator._kernel import (
    BURST_BYTES,
    BURST_END,
    BURST_UNTIL,
    FIRST,
    HEAD,
    KNOWN,
    SIZE,
    TAIL,
    _bits_by,
    _clear,
    _is_known,
    _next_change_s,
    _ready_s,
    _time_for,
    _wake_s,
    _window_rate,
    frame_bytes,
    jit_cached,
)
from kvstream.testbed.simulator._rules import (
    KVSTREAM,
    N_REASONS,
    TEXT,
    add_goodput,
    choose,
    flight_sample,
    jit,
    kvstream,
    link_samples,
)
from kvstream.testbed.simulator.simulator import EPSILON_S
from kvstream.testbed.workloads import request_trace
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS
from kvstream.traces.fluid import MIN_FRAME_BYTES

PYTHON = KVSTREAM + 1
"""The kind of a rule that is none of `_rules`'s."""
FCFS, SHORTEST, ASK = range(3)
"""Orders; ASK is Python's."""
ALL, FEASIBLE = range(2)
"""Admissions beside ASK."""
NONE, MANIFEST, PREFILL = -1, -2, -2
IDLE, FLYING, ARRIVED, COMPUTING, DONE = range(5)
"""States of a chunk."""
WAITING, TURNED_AWAY, SERVED = range(3)
"""States of a request."""
FINISHED, CHOOSE, KEY, ADMIT = range(4)
"""Why `advance` returned."""
BYTE = 8.0
"""Bits: what is left of a transfer below this has arrived. Sums over a day of a fast link are no more exact."""
N_POINTS = 64

SLOT = np.dtype([
    ("request", "i8"), ("engine", "i8"), ("link", "i8"), ("arrival_s", "f8"), ("prefill_s", "f8"), ("chunks", "i8"),
    ("flying", "i8"), ("unasked", "i8"), ("low", "i8"), ("high", "i8"), ("arrived", "i8"), ("front", "i8"),
    ("uncomputed", "i8"), ("dirty", "i8"), ("lowest_bytes", "i8"), ("come", "i8"), ("last_end_s", "f8"),
    # the answer on the link, and the one behind it
    ("flow", "i8"), ("on", "i8"), ("begin_s", "f8"), ("bits", "f8"), ("done", "f8"), ("frame", "f8"), ("seen", "i8"),
    ("first_s", "f8"), ("timer_s", "f8"), ("change_s", "f8"), ("shared_s", "f8"), ("next", "i8"), ("next_s", "f8"),
    ("burst_bytes", "i8"), ("burst_end_s", "f8"),
    # the step that is computed or waits for the engine
    ("job", "i8"), ("job_number", "i8"), ("job_since_s", "f8"),
])  # fmt: skip
CHUNK = np.dtype([
    ("state", "i1"), ("level", "i1"), ("bytes", "i8"), ("received", "i8"), ("request_s", "f8"), ("first_s", "f8"),
    ("start_s", "f8"), ("end_s", "f8"),
])  # fmt: skip
TRANSFER = np.dtype([
    ("chunk", "i8"), ("level", "i1"), ("bytes", "i8"), ("request_s", "f8"), ("first_s", "f8"), ("end_s", "f8"),
    ("goodput_bps", "f8"), ("burst_bytes", "i8"), ("burst_end_s", "f8"),
])  # fmt: skip
LINK = np.dtype([("moved_s", "f8"), ("active", "i8"), ("due_s", "f8"), ("stale", "i1"), ("delivered_bits", "f8")])
ENGINE = np.dtype([("slot", "i8"), ("start_s", "f8"), ("end_s", "f8"), ("busy_s", "f8"), ("serving", "i8")])
OUTCOME = np.dtype([
    ("state", "i1"), ("begin_s", "f8"), ("done_s", "f8"), ("engine", "i8"), ("cached", "i8"), ("stored", "i8"),
    ("bytes", "i8"), ("loss", "f8"),
])  # fmt: skip
NEXT, LEFT, NUMBER, HEAP, ASKED, TOUCHES = range(6)
"""Counters."""


# --- requests that wait: a binary heap of (key, request)


@jit
def _before(keys, heap, a, b):
    return keys[heap[a]] < keys[heap[b]] or (keys[heap[a]] == keys[heap[b]] and heap[a] < heap[b])


@jit
def _push(keys, heap, counters, request):
    at = counters[HEAP]
    counters[HEAP] += 1
    heap[at] = request
    while at > 0 and _before(keys, heap, at, (at - 1) // 2):
        heap[at], heap[(at - 1) // 2] = heap[(at - 1) // 2], heap[at]
        at = (at - 1) // 2


@jit
def _pop(keys, heap, counters):
    counters[HEAP] -= 1
    n, at = counters[HEAP], 0
    heap[0] = heap[n]
    while True:
        least = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < n and _before(keys, heap, child, least):
                least = child
        if least == at:
            return
        heap[at], heap[least] = heap[least], heap[at]
        at = least


# --- caches: [0, engines) are the engines' own, the last is the store; the least recently used block goes first


@jit
def _touch(caches, counters, cache, block):
    """A block was used; `stamps` [cache, block] is when, 0 where it is not held. Uses of a cache are a chain, in which
    all but a block's newest are void."""
    stamps, held, capacity, heads, tails, uses = caches
    if capacity[cache] == 0:
        return
    counters[TOUCHES] += 1
    stamp = counters[TOUCHES]
    held[cache] += stamps[cache, block] == 0
    stamps[cache, block] = stamp
    at = stamp - 1
    uses[at, 0], uses[at, 1], uses[at, 2] = block, stamp, NONE
    if tails[cache] == NONE:
        heads[cache] = at
    else:
        uses[tails[cache], 2] = at
    tails[cache] = at
    while held[cache] > capacity[cache]:
        at = heads[cache]
        heads[cache] = uses[at, 2]
        if stamps[cache, uses[at, 0]] == uses[at, 1]:
            stamps[cache, uses[at, 0]] = 0
            held[cache] -= 1


@jit
def _held(caches, cache, blocks, first):
    """How many of `blocks`, from number `first` on, a cache holds in a row."""
    stamps = caches[0]
    n = first
    while n < len(blocks) and stamps[cache, blocks[n]] > 0:
        n += 1
    return n - first


# --- costs


@jit
def forward_s(model, start, stop):
    """`Workload.forward_s`."""
    parameters, attention, element_bytes, elements, flops, memory = model
    tokens = stop - start
    read = element_bytes * (parameters + start * elements)
    work = 2.0 * parameters * tokens + attention * tokens * (start + stop) / 2.0
    return max(work / flops, read / memory)


# --- links


@jit
def _carry(link, trace, slots, of_link, now_s):
    """Move the flows of a link on to `now_s`, in equal shares."""
    if now_s > link.moved_s:
        if link.active:
            bits = _bits_by(trace, now_s) - _bits_by(trace, link.moved_s)
            link.delivered_bits += bits
            share = bits / link.active
            for s in range(of_link[0], of_link[1]):
                if slots[s].on:
                    slots[s].done += share
        link.moved_s = now_s


@jit
def _mark(one):
    """Bits of the answer at which its receiver sees something: the first frame, then the end."""
    return one.frame if not one.seen and one.frame < one.bits else one.bits


@jit
def _due(link, trace, slots, of_link):
    """When a flow reaches its mark."""
    link.stale = 0
    least = math.inf
    for s in range(of_link[0], of_link[1]):
        if slots[s].on:
            least = min(least, _mark(slots[s]) - slots[s].done)
    link.due_s = math.inf
    if least < math.inf:
        link.due_s = link.moved_s + _time_for(trace, link.active * max(least, 0.0), link.moved_s)
        if least > 0.0:  # time moves on, however fast the link is
            link.due_s = max(link.due_s, np.nextafter(link.moved_s, math.inf))


@jit
def _share_changed(link, slots, of_link, by, now_s):
    """By slot `by`. Sessions that wait for their moment look again soon: the rate that they saw is not that of now."""
    link.stale = 1
    for s in range(of_link[0], of_link[1]):
        if slots[s].on and s != by:
            slots[s].shared_s = now_s
            if slots[s].timer_s < math.inf:
                slots[s].timer_s = min(slots[s].timer_s, now_s + RATE_WINDOW_S / 4)


@jit
def _place(one, chunk, link, trace, depth, manifest_bytes, now_s):
    """The slot's answer begins to pass the bottleneck."""
    size = manifest_bytes if one.flow == MANIFEST else chunk[one.flow].bytes
    fine = one.flow != MANIFEST and depth > 1 and size > MIN_FRAME_BYTES
    one.on, one.seen, one.done, one.bits = 1, 0, 0.0, 8.0 * size
    one.frame = 8.0 * frame_bytes(size) if fine else one.bits
    one.first_s = now_s + _time_for(trace, 8.0 * link.active, now_s) - one.arrival_s
    one.timer_s, one.shared_s = math.inf, -math.inf
    one.change_s = _next_change_s(trace, now_s) if fine else math.inf
    link.stale = 1


@jit
def request_chunk(one, chunk, size, text_bytes, k, level, now_s, rtt_s):
    """The receiver asks for chunk k; TEXT for its text."""
    mine = chunk[k]
    mine.state, mine.level, mine.received = FLYING, level, 0
    mine.bytes = text_bytes[k] if level == TEXT else size[k, level]
    mine.request_s = now_s - one.arrival_s
    one.flying += 1
    one.unasked -= 1
    while one.low < one.chunks and chunk[one.low].state != IDLE:
        one.low += 1
    while one.high > one.low and chunk[one.high - 1].state != IDLE:
        one.high -= 1
    if one.flow == NONE:
        one.flow, one.begin_s, one.on = k, now_s + rtt_s, 0
    else:
        one.next, one.next_s = k, now_s + rtt_s


# --- what a receiver sees of its answer


@jit
def _note(rate, points, now_s, received):
    """`ArrivalRate.add`; of more points than there is room for the oldest goes."""
    if now_s <= rate[BURST_UNTIL]:
        rate[HEAD] = rate[TAIL] = 0.0
        rate[BURST_END], rate[BURST_BYTES] = now_s, received
    head, tail = int(rate[HEAD]), int(rate[TAIL])
    if tail == len(points):
        head = max(head, 1)
        for at in range(tail - head):
            points[at, 0], points[at, 1] = points[head + at, 0], points[head + at, 1]
        head, tail = 0, tail - head
    points[tail, 0], points[tail, 1] = now_s, received
    tail += 1
    while tail - head > 2 and points[head + 1, 0] <= now_s - RATE_WINDOW_S:
        head += 1
    rate[HEAD], rate[TAIL] = head, tail


@jit
def _see(one, chunk, rate, points, now_s):
    """What has come so far is reported to the session."""
    t, mine = now_s - one.arrival_s, chunk[one.flow]
    if not one.seen:
        one.seen = 1
        mine.first_s = min(one.first_s, t)
        _clear(rate)
        rate[SIZE], rate[FIRST] = mine.bytes, mine.first_s
        rate[BURST_UNTIL] = mine.first_s + BURST_S if mine.first_s > one.last_end_s + BURST_S else 0.0
        points[0, 0], points[0, 1] = mine.first_s, 0.0
        rate[TAIL] = 1.0
    if one.done < one.bits - BYTE:
        mine.received = min(int(one.done / 8.0), mine.bytes - 1)
        _note(rate, points, t, mine.received)
        one.burst_bytes, one.burst_end_s = int(rate[BURST_BYTES]), rate[BURST_END]
    one.dirty = 1


@jit
def _complete(one, chunk, transfers, size, rate, points, now_s):
    """All of the answer is here; the one behind it moves up, and begins at `begin_s`."""
    one.dirty, one.timer_s = 1, math.inf
    if one.flow != MANIFEST:
        _see(one, chunk, rate, points, now_s)
        t, k = now_s - one.arrival_s, one.flow
        mine, done = chunk[k], transfers[one.arrived]
        mine.received, mine.state = mine.bytes, ARRIVED
        goodput = mine.bytes * 8 / max(t - max(mine.request_s, one.last_end_s), 1e-9)
        if mine.level != TEXT:
            _note(rate, points, t, mine.bytes)
            found = _window_rate(rate, points) if _is_known(rate, points) else math.nan
            rate[KNOWN] = goodput if math.isnan(found) else 8.0 * found
        done.chunk, done.level, done.bytes = k, mine.level, mine.bytes
        done.request_s, done.first_s, done.end_s, done.goodput_bps = mine.request_s, mine.first_s, t, goodput
        done.burst_bytes, done.burst_end_s = int(rate[BURST_BYTES]), rate[BURST_END]
        _clear(rate)
        one.last_end_s = t
        one.arrived += 1
        one.flying -= 1
        one.come += size[k, 0]
    one.flow, one.seen, one.on, one.burst_bytes, one.burst_end_s = NONE, 0, 0, 0, 0.0
    if one.next != NONE:
        one.flow, one.begin_s, one.next = one.next, max(one.next_s, now_s), NONE


@jit
def _next_look(one, rate, points, trace, now_s, lookahead_s):
    """When the receiver would next have something to decide: `simulator._Driver._next_event_s`, and soon after the
    flow's share has changed."""
    one.timer_s = math.inf
    if one.unasked == 0 or one.flying != 1:
        return
    wake_s = _wake_s(rate, points, lookahead_s)
    if math.isnan(wake_s):
        return
    wake_s = max(max(0.0, wake_s) + one.arrival_s, now_s + EPSILON_S)
    if one.change_s <= now_s - RATE_WINDOW_S:
        one.change_s = _next_change_s(trace, now_s - RATE_WINDOW_S)
    settled_s = max(one.change_s - RATE_WINDOW_S, now_s) + RATE_WINDOW_S / 4
    if one.shared_s > now_s - RATE_WINDOW_S:
        settled_s = min(settled_s, now_s + RATE_WINDOW_S / 4)
    one.timer_s = min(wake_s, settled_s)


# --- sessions


@jit
def _cost_s(one, chunk, decode_s, recompute_s, k):
    return recompute_s[k] if chunk[k].level == TEXT else decode_s[k, chunk[k].level]


@jit
def backlog_s(one, chunk, transfers, decode_s, recompute_s, now_s):
    """`Session._backlog_s`."""
    found = 0.0
    for i in range(one.arrived):
        if chunk[transfers[i].chunk].state == ARRIVED:
            found += _cost_s(one, chunk, decode_s, recompute_s, transfers[i].chunk)
    if one.flow >= 0:
        found += _cost_s(one, chunk, decode_s, recompute_s, one.flow)
    if one.next >= 0:
        found += _cost_s(one, chunk, decode_s, recompute_s, one.next)
    if one.job >= 0:
        had_s = now_s - one.arrival_s - one.job_since_s
        found += max(_cost_s(one, chunk, decode_s, recompute_s, one.job) - had_s, OVERRUN * had_s)
    return found


@jit
def _wants(one, rate, points, depth, now_s, lookahead_s):
    """Whether the session chooses a chunk now."""
    if one.unasked == 0 or one.flow == MANIFEST or one.flying >= depth:
        return False
    if one.flying == 0:
        return True
    ready_s = _ready_s(rate, points, lookahead_s)
    return not math.isnan(ready_s) and now_s - one.arrival_s >= ready_s - 1e-9


@jit
def _sample(one, chunk, transfers, now_s, rtt_s):
    """`estimators.flight_sample`."""
    k = one.flow
    if k < 0:
        return 0.0, 0.0
    free_s = transfers[one.arrived - 1].end_s if one.arrived else 0.0
    first_s = chunk[k].first_s if one.seen else chunk[k].request_s + rtt_s
    return flight_sample(
        chunk[k].level, chunk[k].received, one.burst_bytes, one.burst_end_s, first_s, free_s, now_s
    )  # fmt: skip


@jit
def _goodputs(one, transfers, sample, found):
    """`estimators.goodputs` into `found`; returns how many."""
    n, before = 0, (0.0, 0.0)
    for i in range(one.arrived):
        if transfers[i].level != TEXT:
            before = add_goodput(found, n, before, transfers[i].bytes, transfers[i].goodput_bps)
            n += 1
    if n == 0 and sample[0] > 0.0:
        found[0], n = sample[0] / sample[1], 1
    return n


@jit
def _decide(one, chunk, transfers, tables, rule, facts, scratch):
    """(level, chunk) by a compiled rule. Compute takes its estimate: there is no spread here."""
    size, text_bytes, decode_s, recompute_s, left, _ = tables
    now_s, deadline_s, rtt_s, concurrent = facts
    t = now_s - one.arrival_s
    backlog = backlog_s(one, chunk, transfers, decode_s, recompute_s, now_s)
    waiting, partly = 0, 0.0
    for k in (one.flow, one.next):
        if k >= 0:
            waiting += chunk[k].bytes - chunk[k].received
            partly += size[k, 0] * chunk[k].received / chunk[k].bytes
    sample = _sample(one, chunk, transfers, t, rtt_s)
    reasons = np.empty((one.chunks, N_REASONS))
    if rule[0] == KVSTREAM:
        n = link_samples(
            transfers.level, transfers.bytes, transfers.first_s, transfers.end_s, transfers.burst_bytes,
            transfers.burst_end_s, one.arrived, sample, scratch,
        )  # fmt: skip
        seen = (
            t, deadline_s, one.low, one.high, waiting, backlog, one.prefill_s, rtt_s, one.flying > 0, concurrent,
            math.nan,
        )  # fmt: skip
        ours, spreads = (rule[11], rule[12], rule[13], rule[3]), (1.0, 1.0, 0.0, 0.0, 0.0)
        return kvstream(ours, scratch[:n], (size, decode_s, recompute_s, True), spreads, seen, reasons)
    n = _goodputs(one, transfers, sample, scratch[:, 0])
    seen = t, deadline_s, one.low, waiting, one.come + partly, backlog, 1.0, 1.0, one.prefill_s, concurrent
    context = size, text_bytes, decode_s, recompute_s, True, one.lowest_bytes
    return choose(rule, context, seen, scratch[:n, 0].copy(), left, reasons[0]), one.low


@jit
def _begin_step(one, chunk, transfers, counters, now_s):
    """The session hands its engine the next step, if one is ready: `Session._next_compute`."""
    if one.job != NONE or one.flow == MANIFEST:
        return
    found = PREFILL if one.uncomputed == 0 else NONE
    for i in range(one.arrived):
        k = transfers[i].chunk
        if chunk[k].state == ARRIVED and (chunk[k].level != TEXT or one.front >= k):
            found = k
            break
    if found != NONE:
        one.job, one.job_number, one.job_since_s = found, counters[NUMBER], now_s - one.arrival_s
        counters[NUMBER] += 1
        if found >= 0:
            chunk[found].state = COMPUTING


@jit
def _open(s, slots, chunks, tables, sizes, model, costs, request, engine, span, setting, now_s, arrival_s):
    """A request takes slot s: tokens `span` = (first, end, all) are fetched, the rest is computed."""
    chunk_tokens, shared, rtt_s, text_bytes_per_token, decode_per_token = setting
    size, text_bytes, decode_s, recompute_s, left, tokens = tables
    one = slots[s]
    first, end, every = span
    n = -(-(end - first) // chunk_tokens)
    one.request, one.engine, one.link, one.arrival_s = request, engine, 0 if shared else engine, arrival_s
    one.chunks = one.unasked = one.uncomputed = one.high = n
    one.flying = one.low = one.arrived = one.front = one.come = one.lowest_bytes = one.burst_bytes = 0
    one.last_end_s, one.burst_end_s, one.timer_s, one.job, one.next, one.on = 0.0, 0.0, math.inf, NONE, NONE, 0
    one.prefill_s = forward_s(model, end, every)
    one.flow = MANIFEST if n else NONE
    one.begin_s, one.dirty = now_s + rtt_s, 1
    for k in range(n):
        start = first + k * chunk_tokens
        stop = min(start + chunk_tokens, end)
        chunks[s, k].state = IDLE
        tokens[s, k], text_bytes[s, k] = stop - start, (stop - start) * text_bytes_per_token
        recompute_s[s, k] = forward_s(model, start, stop)
        for level in range(size.shape[2]):
            size[s, k, level] = sizes[(stop - start) // BLOCK_TOKENS, level]
            decode_s[s, k, level] = (stop - start) * decode_per_token
        one.lowest_bytes += size[s, k, 0]
    for level in range(size.shape[2]):
        total = 0
        for k in range(n - 1, -1, -1):
            total += size[s, k, level]
            left[s, k, level] = total


@jit
def _best_engine(engines, caches, blocks, slots_per):
    """(engine, blocks that it holds): of those with a free slot the one that holds most of the prefix, then the one
    that serves fewest; (-1, ...) if none is free."""
    best, most = NONE, -1
    for e in range(len(engines)):
        if engines[e].serving < slots_per:
            held = _held(caches, e, blocks, 0)
            if held > most or (held == most and engines[e].serving < engines[best].serving):
                best, most = e, held
    return best, most


# --- for policies in Python


@jit
def answer(state, tables, s, k, level, now_s, rtt_s):
    """The answer to CHOOSE."""
    slots, chunks = state[0], state[1]
    request_chunk(slots[s], chunks[s], tables[0][s], tables[1][s], k, level, now_s, rtt_s)


@jit
def backlog_of(state, tables, s, now_s):
    """`Session._backlog_s` of the request in slot s."""
    slots, chunks, transfers = state[0], state[1], state[2]
    return backlog_s(slots[s], chunks[s], transfers[s], tables[2][s], tables[3][s], now_s)


_SOURCES = _kernel.sources(_kernel, request_trace, *_kernel.BENEATH)


def _loop(sources):
    """`sources` is in the closure for numba's cache, which looks at a function and what it closes over."""

    def advance(state, workload, tables, rule, model, costs, setting, trace):
        """Run until all requests are done (FINISHED), or Python must answer: (CHOOSE, slot), (KEY, request),
        (ADMIT, request). Requests that a dead link leaves behind stay WAITING."""
        slots, chunks, transfers, rates, points, links, engines, caches, queue, outcomes, clock, counters = state
        arrivals_s, tokens_of, firsts, blocks = workload
        size, text_bytes, decode_s, recompute_s, left, tokens = tables
        keys, heap, keyed, verdicts = queue
        sizes, distortion, manifest_bytes = costs
        deadline_s, rtt_s, depth, order, admission, chunk_tokens, slots_per, shared, text_size, decode_per = setting
        of_slot = (chunk_tokens, shared, rtt_s, text_size, decode_per)
        lookahead_s, n_slots, store = rtt_s + LOOKAHEAD_MARGIN_S, len(slots), len(engines)
        if len(sources) == 0:  # never; what is not used is not in the closure
            return FINISHED, NONE
        while True:
            now_s = clock[0]
            for s in range(n_slots):
                one = slots[s]
                if one.request == NONE or not one.dirty:
                    continue
                own = size[s], text_bytes[s], decode_s[s], recompute_s[s], left[s], tokens[s]
                while _wants(one, rates[s], points[s], depth, now_s, lookahead_s):
                    if rule[0] == PYTHON:
                        return CHOOSE, s
                    facts = now_s, deadline_s, rtt_s, engines[one.engine].serving
                    scratch = np.empty((one.chunks + 2, 2))
                    level, k = _decide(
                        one, chunks[s], transfers[s], own, rule, facts, scratch
                    )  # fmt: skip
                    request_chunk(one, chunks[s], size[s], text_bytes[s], k, level, now_s, rtt_s)
                _begin_step(one, chunks[s], transfers[s], counters, now_s)
                if one.on and one.seen and depth > 1:
                    _next_look(one, rates[s], points[s], trace, now_s, lookahead_s)
                one.dirty = 0
            for e in range(len(engines)):
                if engines[e].slot == NONE:
                    first = NONE
                    for s in range(e * slots_per, (e + 1) * slots_per):
                        waits = slots[s].request != NONE and slots[s].job != NONE
                        if waits and (first == NONE or slots[s].job_number < slots[first].job_number):
                            first = s
                    if first != NONE:
                        one = slots[first]
                        step_s = one.prefill_s
                        if one.job >= 0:
                            step_s = _cost_s(one, chunks[first], decode_s[first], recompute_s[first], one.job)
                        engines[e].slot, engines[e].start_s, engines[e].end_s = first, now_s, now_s + step_s

            # requests that have come, and free slots
            while counters[NEXT] < len(arrivals_s) and arrivals_s[counters[NEXT]] <= now_s:
                request = counters[NEXT]
                if order == ASK and not keyed[request]:
                    return KEY, request
                if order == FCFS:
                    keys[request] = arrivals_s[request]
                elif order == SHORTEST:
                    mine = blocks[firsts[request] : firsts[request + 1]][: (tokens_of[request] - 1) // BLOCK_TOKENS]
                    end = BLOCK_TOKENS * _held(caches, store, mine, 0)
                    keys[request] = forward_s(model, end, tokens_of[request])
                _push(keys, heap, counters, request)
                counters[NEXT] += 1
            began = False
            while counters[HEAP]:
                request = heap[0]
                all_blocks = blocks[firsts[request] : firsts[request + 1]]
                # the last token is always computed: its output is the first token
                mine = all_blocks[: (tokens_of[request] - 1) // BLOCK_TOKENS]
                e, held = _best_engine(engines, caches, mine, slots_per)
                if e == NONE:
                    break
                if admission == ASK and verdicts[request] == 0:
                    return ADMIT, request
                end = held + _held(caches, store, mine, held)
                span = (held * BLOCK_TOKENS, end * BLOCK_TOKENS, tokens_of[request])
                refused = admission == ASK and verdicts[request] == 2
                if admission == FEASIBLE:
                    least_s = now_s - arrivals_s[request] + forward_s(model, span[1], span[2])
                    refused = least_s > deadline_s
                _pop(keys, heap, counters)
                if refused:
                    outcomes[request].state = TURNED_AWAY
                    counters[LEFT] -= 1
                    continue
                s = e * slots_per
                while slots[s].request != NONE:
                    s += 1
                _open(
                    s, slots, chunks, tables, sizes, model, costs, request, e, span, of_slot, now_s,
                    arrivals_s[request],
                )  # fmt: skip
                for at in range(8):
                    rates[s, at] = 0.0
                rates[s, KNOWN] = math.nan
                engines[e].serving += 1
                mine_out = outcomes[request]
                mine_out.begin_s, mine_out.engine = now_s, e
                mine_out.cached, mine_out.stored = span[0], span[1] - span[0]
                began = True
            if began:
                continue
            if counters[LEFT] == 0:
                return FINISHED, NONE

            # the next event
            next_s = arrivals_s[counters[NEXT]] if counters[NEXT] < len(arrivals_s) else math.inf
            for g in range(len(links)):
                of_link = (0, n_slots) if shared else (g * slots_per, (g + 1) * slots_per)
                if links[g].stale:
                    _due(links[g], trace, slots, of_link)
                next_s = min(next_s, links[g].due_s)
            for s in range(n_slots):
                if slots[s].request != NONE and slots[s].flow != NONE:
                    next_s = min(next_s, slots[s].timer_s if slots[s].on else slots[s].begin_s)
            for e in range(len(engines)):
                next_s = min(next_s, engines[e].end_s)
            if next_s == math.inf:
                return FINISHED, NONE
            now_s = max(now_s, next_s)
            clock[0] = now_s
            for s in range(n_slots):
                one = slots[s]
                if one.request == NONE or one.flow == NONE:
                    continue
                g = one.link
                of_link = (0, n_slots) if shared else (g * slots_per, (g + 1) * slots_per)
                if one.on:
                    if one.timer_s > now_s and links[g].due_s > now_s:
                        continue
                    _carry(links[g], trace, slots, of_link, now_s)
                    links[g].stale = 1
                    if one.done >= one.bits - BYTE:
                        _complete(one, chunks[s], transfers[s], size[s], rates[s], points[s], now_s)
                        if one.flow != NONE and one.begin_s <= now_s:
                            _place(one, chunks[s], links[g], trace, depth, 0, now_s)
                        else:
                            links[g].active -= 1
                            _share_changed(links[g], slots, of_link, s, now_s)
                    elif one.done >= _mark(one) - BYTE or one.timer_s <= now_s:
                        _see(one, chunks[s], rates[s], points[s], now_s)
                        one.timer_s = math.inf
                elif one.begin_s <= now_s:
                    _carry(links[g], trace, slots, of_link, now_s)
                    links[g].active += 1
                    _place(one, chunks[s], links[g], trace, depth, manifest_bytes[one.chunks], now_s)
                    _share_changed(links[g], slots, of_link, s, now_s)
            for e in range(len(engines)):
                if engines[e].end_s > now_s:
                    continue
                s = engines[e].slot
                one = slots[s]
                engines[e].busy_s += engines[e].end_s - engines[e].start_s
                engines[e].slot, engines[e].end_s = NONE, math.inf
                job, one.job, one.dirty = one.job, NONE, 1
                if job >= 0:
                    chunks[s, job].state = DONE
                    chunks[s, job].start_s = engines[e].start_s - one.arrival_s
                    chunks[s, job].end_s = now_s - one.arrival_s
                    one.uncomputed -= 1
                    while one.front < one.chunks and chunks[s, one.front].state == DONE:
                        one.front += 1
                    continue
                # the first token is out, and the prompt's full blocks are in both caches: roots youngest
                request = one.request
                mine_out = outcomes[request]
                mine_out.state, mine_out.done_s = SERVED, now_s
                for k in range(one.chunks):
                    mine_out.bytes += chunks[s, k].bytes
                    if chunks[s, k].level != TEXT:
                        mine_out.loss += tokens[s, k] * distortion[chunks[s, k].level]
                all_blocks = blocks[firsts[request] : firsts[request + 1]]
                for i in range(min(len(all_blocks), tokens_of[request] // BLOCK_TOKENS) - 1, -1, -1):
                    _touch(caches, counters, e, all_blocks[i])
                    _touch(caches, counters, store, all_blocks[i])
                engines[e].serving -= 1
                one.request = NONE
                counters[LEFT] -= 1

    return jit_cached(advance)


advance = _loop(_SOURCES)
