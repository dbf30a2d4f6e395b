"""A trace's arithmetic: bits by a time, its inverse, what follows the end, and the traces made from it."""

from __future__ import annotations

import dataclasses
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvstream.traces.errors import TraceError
from kvstream.traces.framing import capacity_bps, goodput_bps, goodput_per_capacity
from kvstream.traces.trace import MAX_RATE_BPS, Provenance, Trace

ENDS = ("loop", "hold", "stop")
durations = st.floats(0.001, 10.0)
rates = st.one_of(st.just(0.0), st.floats(1e3, 1e10))
times = st.floats(0.0, 100.0)


@st.composite
def traces(draw, ends=ENDS, columns=False):
    rows = draw(st.lists(st.tuples(durations, rates), min_size=1, max_size=12))
    extra = {}
    if columns:
        extra["delay_s"] = [0.01 * i for i in range(len(rows))]
        extra["loss"] = [0.01 * (i % 7) for i in range(len(rows))]
    return Trace("t", [d for d, _ in rows], [r for _, r in rows], end=draw(st.sampled_from(ends)), **extra)


def near(a, b, trace, span=200.0):
    """Equal up to rounding of the sums that both were made of."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9 * (1.0 + trace.peak_bps) * span)


def by_hand(trace: Trace, t_s: float) -> float:
    """The integral, summed row by row."""
    bits, at = 0.0, 0.0
    while at < t_s:
        for duration, rate in zip(trace.durations_s.tolist(), trace.rates_bps.tolist(), strict=True):
            bits += rate * max(0.0, min(duration, t_s - at))
            at += duration
        if trace.end == "hold":
            return bits + trace.rates_bps[-1] * max(0.0, t_s - at)
        if trace.end == "stop":
            return bits
    return bits


# ---- bits_by and time_for


@given(traces(), times)
def test_bits_by_is_the_integral(trace, t):
    assert near(trace.bits_by(t), by_hand(trace, t), trace)


@given(traces(), st.lists(times, max_size=20))
def test_arrays_give_what_scalars_give(trace, ts):
    many = trace.bits_by(np.array(ts))
    assert many.shape == (len(ts),)
    assert all(near(got, trace.bits_by(t), trace) for got, t in zip(many.tolist(), ts, strict=True))


@given(traces(), times, times)
def test_bits_never_fall(trace, a, b):
    low, high = sorted((a, b))
    assert trace.bits_by(low) <= trace.bits_by(high) + 1e-9 * (1 + trace.bits_by(high))


@given(traces(), times, st.floats(1.0, 1e10))
def test_time_for_inverts_bits_by(trace, start, bits):
    needed = trace.time_for(bits, start)
    assume(needed < math.inf)
    got = trace.bits_by(start + needed) - trace.bits_by(start)
    assert near(got, bits, trace, span=start + needed + 1.0)


@given(traces(), st.floats(0.0, 1.5), st.floats(0.1, 3.0))
def test_time_for_is_infinite_where_the_bits_never_arrive_and_only_there(trace, start_share, bits_share):
    start, bits = start_share * trace.duration_s, max(bits_share * trace.bits_by(trace.duration_s), 1.0)
    rows_carry = trace.bits_by(trace.duration_s) - trace.bits_by(min(start, trace.duration_s))
    assume(not near(rows_carry, bits, trace))
    after_bps = {"loop": trace.mean_bps, "hold": trace.rates_bps[-1], "stop": 0.0}[trace.end]
    assert (trace.time_for(bits, start) == math.inf) == (after_bps == 0.0 and rows_carry < bits)


@given(traces(), times, st.floats(1.0, 1e10))
def test_time_for_is_the_earliest(trace, start, bits):
    needed = trace.time_for(bits, start)
    assume(1e-3 < needed < math.inf)
    sooner = trace.bits_by(start + needed - 1e-3) - trace.bits_by(start)
    assert sooner < bits or near(sooner, bits, trace, span=start + needed + 1.0)


def test_time_for_at_the_corners():
    trace = Trace("t", [1.0, 1.0, 1.0], [0.0, 100.0, 0.0])
    assert trace.time_for(0.0, 5.0) == 0.0
    assert trace.time_for(50.0, 0.0) == 1.5
    assert trace.time_for(100.0, 0.0) == 2.0  # the last bit, not the end of the silence behind it
    assert trace.time_for(200.0, 0.0) == 5.0
    assert trace.time_for(100.0, 2.5) == 2.5
    assert trace.time_for(math.inf, 0.0) == math.inf
    held = trace.with_end("hold")
    assert held.time_for(100.0, 0.0) == 2.0
    assert held.time_for(101.0, 0.0) == math.inf
    assert Trace("t", [1.0], [10.0], end="hold").time_for(10.0, 100.0) == 1.0
    assert Trace("t", [1.0], [0.0]).time_for(1.0, 0.0) == math.inf


@pytest.mark.parametrize("end", ENDS)
def test_what_follows_the_last_row(end):
    trace = Trace("t", [2.0, 1.0], [10.0, 40.0], end=end)
    assert trace.bits_by(3.0) == 60.0
    assert trace.rate_at(2.0) == 40.0  # a row holds from its own start
    assert trace.rate_at(3.5) == {"loop": 10.0, "hold": 40.0, "stop": 0.0}[end]
    assert trace.bits_by(5.0) == {"loop": 80.0, "hold": 140.0, "stop": 60.0}[end]
    assert trace.row_at(4.0) == {"loop": 0, "hold": 1, "stop": None}[end]
    assert trace.time_for(20.0, 2.5) == {"loop": 0.5, "hold": 0.5, "stop": 0.5}[end]
    assert trace.time_for(30.0, 2.5) == {"loop": 1.5, "hold": 0.75, "stop": math.inf}[end]


def test_a_halved_trace_takes_twice_as_long():
    trace = Trace("t", [0.5], [8e6])
    assert trace.scaled(0.5).time_for(4e6, 0.1) == pytest.approx(2 * trace.time_for(4e6, 0.1))


# ---- windows


@given(traces(), times, st.floats(0.01, 50.0))
def test_changes_replay_the_trace(trace, start, length):
    steps = trace.changes(start, length)
    assert steps[0][0] == 0.0
    assert all(a[0] < b[0] < length and a[1] != b[1] for a, b in pairwise(steps))
    ends = [at for at, _ in steps[1:]] + [length]
    total = sum(rate * (until - at) for (at, rate), until in zip(steps, ends, strict=True))
    assert near(total, trace.bits_by(start + length) - trace.bits_by(start), trace)


@given(traces(ends=("stop",)), times)
def test_no_shift_beyond_the_end_of_a_trace_that_stops(trace, beyond):
    with pytest.raises(TraceError, match="no start offset"):
        trace.shifted(trace.duration_s + beyond)


@given(traces(), times, times)
def test_shifted_begins_later(trace, offset, t):
    assume(trace.end != "stop" or offset < trace.duration_s)
    assert near(trace.shifted(offset).bits_by(t), trace.bits_by(offset + t) - trace.bits_by(offset), trace)


@given(traces(columns=True), times, st.floats(0.01, 50.0), st.floats(0.0, 1.0))
def test_sliced_is_the_window(trace, start, length, share):
    window = trace.sliced(start, length)
    assert window.duration_s == pytest.approx(length)
    t = share * window.duration_s
    assert near(window.bits_by(t), trace.bits_by(start + t) - trace.bits_by(start), trace)
    assert len(window.delay_s) == len(window)


@given(traces(columns=True), st.floats(0.05, 20.0), st.integers(0, 20))
def test_resampled_carries_the_same_bits(trace, step, k):
    coarse = trace.resampled(step)
    t = min(k * step, trace.duration_s)
    assert near(coarse.bits_by(t), trace.bits_by(t), trace)
    assert np.sum(coarse.delay_s[: len(coarse)] >= 0.0) == len(coarse)


@given(traces(ends=("hold",)), st.floats(0.05, 20.0))
def test_resampled_keeps_the_held_rate(trace, step):
    assert trace.resampled(step).rates_bps[-1] == trace.rates_bps[-1]


@given(traces(), traces(), times)
def test_concatenated_is_one_after_the_other(first, second, t):
    joined = first.concatenated(second)
    assert joined.end == second.end
    inside = min(t, joined.duration_s)
    wanted = first.bits_by(min(inside, first.duration_s))
    if inside > first.duration_s:
        wanted += second.bits_by(inside - first.duration_s)
    assert near(joined.bits_by(inside), wanted, joined)


# ---- scaling


@given(traces(), st.floats(0.01, 100.0), times)
def test_scaling_scales_the_bits(trace, factor, t):
    assert near(trace.scaled(factor).bits_by(t), factor * trace.bits_by(t), trace.scaled(factor))


@given(traces(), st.floats(1e3, 1e10))
def test_scale_to_reaches_mean_and_peak(trace, bps):
    assume(trace.mean_bps > 0.0)
    assume(bps / trace.mean_bps * trace.peak_bps <= MAX_RATE_BPS)
    assert trace.scale_to(mean_bps=bps).mean_bps == pytest.approx(bps)
    assert trace.scale_to(peak_bps=bps).peak_bps == pytest.approx(bps)


@pytest.mark.parametrize("target", ["mean_bps", "peak_bps"])
def test_nothing_cannot_be_scaled_to_a_rate(target):
    with pytest.raises(TraceError, match="zero everywhere"):
        Trace("t", [1.0, 2.0], [0.0, 0.0]).scale_to(**{target: 1e6})


@given(traces(), st.floats(0.01, 10.0), times)
def test_stretching_stretches_time(trace, factor, t):
    assert near(trace.stretched(factor).bits_by(t * factor), factor * trace.bits_by(t), trace, span=2000.0)


def test_clipping_bounds_rates():
    clipped = Trace("t", [1, 1, 1], [0.0, 5.0, 9.0]).clipped(1.0, 6.0)
    assert clipped.rates_bps.tolist() == [1.0, 5.0, 6.0]


def test_goodput_and_capacity():
    assert goodput_per_capacity() == 1448 / 1514
    assert goodput_per_capacity(9000) == 8948 / 9014
    assert capacity_bps(goodput_bps(1e9)) == pytest.approx(1e9)
    assert Trace("t", [1.0], [1514.0]).as_goodput().rates_bps[0] == pytest.approx(1448.0)
    with pytest.raises(TraceError, match="mtu 40"):
        goodput_per_capacity(40)


# ---- per chunk


def test_a_per_chunk_trace_has_no_time():
    trace = Trace("c", [], [1e9, 2e9, 3e9], per="chunk")
    assert [trace.chunk_rate(i) for i in range(4)] == [1e9, 2e9, 3e9, 1e9]
    assert trace.with_end("hold").chunk_rate(7) == 3e9
    assert trace.with_end("stop").chunk_rate(3) == 0.0
    assert trace.mean_bps == 2e9
    assert trace.scale_to(mean_bps=1e9).chunk_rate(2) == 1.5e9
    assert trace.over_time(0.2).bits_by(0.4) == pytest.approx(0.6e9)
    refused = [
        lambda: trace.bits_by(1.0),
        lambda: trace.bits_by(np.array([1.0])),
        lambda: trace.time_for(1.0, 0.0),
        lambda: trace.time_for(0.0, 0.0),
        lambda: trace.rate_at(0.0),
        lambda: trace.duration_s,
        lambda: trace.changes(0.0, 1.0),
        lambda: trace.shifted(1.0),
        lambda: trace.sliced(0.0, 1.0),
        lambda: trace.stretched(2.0),
        lambda: trace.resampled(0.1),
        lambda: trace.concatenated(trace),
    ]
    for call in refused:
        with pytest.raises(TraceError, match="per=time"):
            call()
    timed = Trace("t", [1.0], [1.0])
    for call in (lambda: timed.chunk_rate(0), lambda: timed.over_time(1.0), lambda: trace.chunk_rate(-1)):
        with pytest.raises(TraceError):
            call()


# ---- the object


def test_arrays_are_copied_and_read_only():
    given_rates = np.array([1.0, 2.0])
    trace = Trace("t", [1.0, 1.0], given_rates)
    given_rates[0] = 99.0
    assert trace.rates_bps[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        trace.rates_bps[0] = 5.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace.end = "hold"


def test_the_hash_is_of_the_content():
    trace = Trace("a", [1.0, 2.0], [3.0, 4.0])
    assert trace == trace.renamed("b") == Trace("c", [1, 2], [3, 4], provenance=(Provenance("x", "y"),))
    assert len({trace, trace.renamed("b")}) == 1
    others = [
        trace.with_end("hold"),
        trace.scaled(2.0),
        trace.stretched(2.0),
        Trace("a", [1.0, 2.0], [3.0, 4.0], kind="achieved"),
        Trace("a", [1.0, 2.0], [3.0, 4.0], delay_s=[0.0, 0.0]),
        Trace("a", [1.0, 2.0], [3.0, 4.0], loss=[0.0, 0.0]),
        Trace("a", [], [1.0, 2.0, 3.0, 4.0], per="chunk"),
    ]
    assert len({trace, *others}) == 1 + len(others)
    assert Trace("a", [1.0], [-0.0]) == Trace("a", [1.0], [0.0])
    assert trace != "a trace"
    assert trace.sha256 == "db46bcc39048060d3e881cc903f0ab1bb2824ddd8b10e057ccd2eed34f220ff8"
    assert pickle.loads(pickle.dumps(trace)) == trace


def test_every_transform_is_recorded():
    trace = Trace("t", [1.0, 1.0], [4e6, 8e6], provenance=(Provenance("log.txt", "csv"),))
    made = trace.scale_to(mean_bps=3e6).clipped(1e6, 5e6).sliced(0.5, 1.0).stretched(2.0).resampled(0.5)
    made = made.shifted(0.25).with_end("hold").as_goodput().concatenated(Trace("u", [1.0], [1e6]))
    first, second = made.provenance
    words = [transform.split()[0] for transform in first.transforms]
    assert words == ["scaled", "clipped", "sliced", "stretched", "resampled", "shifted", "end", "capacity", "part"]
    assert (first.source, second.source) == ("log.txt", "u")
    assert trace.provenance[0].transforms == ()


BAD = [
    ({"rates_bps": [1.0]}, "length"),
    ({"durations_s": [], "rates_bps": []}, "0 rows"),
    ({"rates_bps": [1.0, -1.0]}, r"rates_bps\[1\] = -1"),
    ({"rates_bps": [math.nan, 1.0]}, r"rates_bps\[0\]"),
    ({"rates_bps": [1.0, math.inf]}, r"rates_bps\[1\]"),
    ({"rates_bps": [1.0, 1e15]}, r"rates_bps\[1\]"),
    ({"rates_bps": [[1.0, 2.0]]}, "one-dimensional"),
    ({"rates_bps": ["fast", "slow"]}, "not a list of numbers"),
    ({"durations_s": [1.0, 0.0]}, r"durations_s\[1\]"),
    ({"durations_s": [1.0, -1.0]}, r"durations_s\[1\]"),
    ({"durations_s": [1.0, 1e-20]}, r"durations_s\[1\]"),
    ({"durations_s": [1e308, 1.7e308]}, "overflow|durations_s"),
    ({"end": "bounce"}, "end='bounce'; choose from loop, hold, stop"),
    ({"kind": "guess"}, "kind"),
    ({"per": "packet"}, "per"),
    ({"per": "chunk"}, "length 0"),
    ({"delay_s": [0.1]}, "delay_s"),
    ({"delay_s": [0.1, -0.1]}, r"delay_s\[1\]"),
    ({"loss": [0.1, 1.1]}, r"loss\[1\]"),
]


@pytest.mark.parametrize(("fields", "says"), BAD)
def test_bad_content_is_refused_in_one_line(fields, says):
    with pytest.raises(TraceError, match=says) as caught:
        Trace(**({"name": "t", "durations_s": [1.0, 1.0], "rates_bps": [1.0, 2.0]} | fields))
    assert "\n" not in str(caught.value)


CALLS = {
    "negative time": lambda t: t.bits_by(-1.0),
    "nan time": lambda t: t.bits_by(math.nan),
    "endless time": lambda t: t.bits_by(math.inf),
    "bad times": lambda t: t.bits_by(np.array([0.0, math.nan])),
    "negative bits": lambda t: t.time_for(-1.0, 0.0),
    "nan bits": lambda t: t.time_for(math.nan, 0.0),
    "negative start": lambda t: t.time_for(1.0, -1.0),
    "rate before the start": lambda t: t.rate_at(-1.0),
    "empty window": lambda t: t.changes(0.0, 0.0),
    "endless window": lambda t: t.changes(0.0, math.inf),
    "huge window": lambda t: t.changes(0.0, 1e9),
    "negative window": lambda t: t.sliced(-1.0, 1.0),
    "negative shift": lambda t: t.shifted(-1.0),
    "scale 0": lambda t: t.scaled(0.0),
    "scale nan": lambda t: t.scaled(math.nan),
    "scale to too much": lambda t: t.scaled(1e15),
    "scale beyond floats": lambda t: t.scaled(1e308).scaled(1e308),
    "stretch beyond floats": lambda t: t.stretched(1e308).stretched(1e308),
    "scale to nothing": lambda t: t.scale_to(),
    "scale to both": lambda t: t.scale_to(mean_bps=1.0, peak_bps=1.0),
    "scale to zero": lambda t: t.scale_to(mean_bps=0.0),
    "clip upside down": lambda t: t.clipped(2.0, 1.0),
    "stretch 0": lambda t: t.stretched(0.0),
    "resample 0": lambda t: t.resampled(0.0),
    "resample too fine": lambda t: t.resampled(1e-9),
    "unknown end": lambda t: t.with_end("bounce"),
    "columns disagree": lambda t: t.concatenated(Trace("u", [1.0], [1.0], delay_s=[0.1])),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_bad_calls_are_refused_in_one_line(call):
    with pytest.raises(TraceError) as caught:
        call(Trace("t", [1.0, 1.0], [1.0, 2.0]))
    assert "\n" not in str(caught.value)
