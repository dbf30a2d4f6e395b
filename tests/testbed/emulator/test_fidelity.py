"""The verdict on a link, on records made up here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.testbed.emulator.fidelity import Limits, expected_bytes, judge, starvation, windows
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.record import Change, CpuSample, LinkRecord, Sample
from kvstream.traces.trace import Trace

FULL = 1 << 30


def record_of(
    trace: Trace, length_s: float = 1.0, factor: float = 1.0, backlog: int = FULL, **fields: object
) -> LinkRecord:
    """A record of a link that delivers `factor` of the trace, sampled every 10 ms."""
    samples = tuple(
        Sample(t, trace.rate_at(t), round(trace.bits_by(t) / 8 * factor), backlog, 0)
        for t in np.arange(0.0, length_s + 0.005, 0.01).tolist()
    )
    changes = tuple(Change(at_s, at_s + 0.0001, rate) for at_s, rate in trace.changes(0.0, length_s))
    base = LinkRecord(100.0, length_s, samples, changes, (), 2, 1514, (), {})
    return replace(base, **fields)


STEPS = Trace("steps", [0.3, 0.3, 0.4], [20e6, 50e6, 10e6])


def test_a_link_that_follows_its_trace_is_ok():
    verdict = judge(record_of(STEPS), STEPS)
    assert verdict.ok
    assert verdict.reasons == ()
    assert verdict.median_error == pytest.approx(0.0, abs=1e-3)
    assert verdict.windows == 10
    assert verdict.backlogged_s == pytest.approx(1.0, abs=0.02)


@settings(deadline=None)
@given(factor=st.floats(0.5, 1.5).filter(lambda factor: abs(abs(factor - 1.0) - Limits().median_error) > 1e-3))
def test_the_error_found_is_the_error_made(factor):
    verdict = judge(record_of(STEPS, factor=factor), STEPS)
    assert verdict.median_error == pytest.approx(abs(factor - 1.0), abs=1e-3)
    assert verdict.total_error == pytest.approx(abs(factor - 1.0), abs=1e-3)
    assert verdict.ok == (abs(factor - 1.0) <= Limits().median_error)


@pytest.mark.parametrize(("packets", "is_ok"), [(0.9, True), (4.0, False)])
def test_a_packet_that_waits_at_a_step_up_is_forgiven_and_no_more(packets, is_ok):
    """At 3 Mbit/s it takes 4 ms, in which 48 Mbit/s carry 24 kB."""
    up = Trace("up", [0.1, 0.1], [3e6, 48e6])
    late_s = packets * 1514 * 8 / 3e6
    late = Trace("late", [0.1 + late_s, 0.1 - late_s], [3e6, 48e6])
    record = replace(record_of(late, 0.2), changes=record_of(up, 0.2).changes)
    assert judge(record, up).ok == is_ok


def test_an_idle_link_is_not_judged_by_its_bytes():
    verdict = judge(record_of(STEPS, factor=0.2, backlog=0), STEPS)
    assert verdict.ok
    assert (verdict.median_error, verdict.total_error, verdict.windows) == (None, None, 0)


def test_a_queue_too_short_to_last_an_interval_does_not_count():
    # 20 Mbit/s carry 25 kB in 10 ms
    assert windows(record_of(STEPS, backlog=24_000), expected_bytes(record_of(STEPS), STEPS), 0.1)[0].start_s > 0.55
    assert windows(record_of(STEPS, backlog=26_000), expected_bytes(record_of(STEPS), STEPS), 0.1)[0].start_s == 0.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"faults": ("0.5 s: the class is gone",)}, "the class is gone"),
        ({"changes": (Change(0.0, 0.02, 20e6),)}, "rate changes late by 20.0 ms"),
        ({"samples": record_of(STEPS).samples[:50]}, "no sample for 510 ms"),
        ({"cpu": (CpuSample(1.0, 0.0, 0.5, 1.5, 1.0),)}, "CPU contention 0.75 s/s (limit 0.10)"),
        ({"impairments": {"lost_by_kernel": 3}}, "the kernel dropped 3 packets before they reached the element"),
    ],
)
def test_each_deviation_is_a_reason(fields, words):
    verdict = judge(record_of(STEPS, **fields), STEPS)
    assert not verdict.ok
    assert any(words in reason for reason in verdict.reasons)


@pytest.mark.parametrize("done", [{"backend": "netem", "dropped": 5}, {"dropped": 5, "lost_by_kernel": 0}])
def test_losses_that_the_link_asks_for_are_reported_and_valid(done):
    verdict = judge(record_of(STEPS, impairments=done), STEPS)
    assert verdict.ok
    assert verdict.to_json()["impairments"] == done


def test_waiting_for_the_run_s_own_threads_is_no_contention():
    busy = record_of(STEPS, cpu=(CpuSample(1.0, 0.0, 2.0, 0.0, 3.0),))
    assert starvation(busy) == 0.0
    assert judge(busy, STEPS).ok


def test_limits_can_be_set():
    slow = record_of(STEPS, factor=0.95)
    assert not judge(slow, STEPS).ok
    assert judge(slow, STEPS, Limits(median_error=0.1, total_error=0.1)).ok


def test_a_trace_of_chunks_is_judged_by_the_steps_that_were_made():
    chunks = Trace("chunks", [], [20e6, 40e6], per="chunk")
    line = Trace("line", [0.5, 0.5], [20e6, 40e6])
    made = replace(record_of(line), changes=(Change(0.0, 0.0, 20e6), Change(0.5, 0.5, 40e6)))
    assert judge(made, chunks).total_error == pytest.approx(0.0, abs=1e-3)
    assert judge(made, None).windows == 10


def test_an_outage_is_left_to_the_total():
    trace = Trace("outage", [0.4, 0.2, 0.4], [20e6, 0.0, 20e6])
    verdict = judge(record_of(trace), trace)
    assert verdict.ok
    assert verdict.windows == 8


# ---- low rates: windows widen, the total is judged, and too little is unjudged


SLOW_MBPS = (0.1, 0.3, 1.0, 1.2, 3.0)


def in_packets(rate_bps: float, length_s: float, factor: float = 1.0, size: int = 1514) -> LinkRecord:
    """A record of whole packets, whose backlog is never empty."""
    trace = Trace("slow", [1.0], [rate_bps])
    times = np.arange(0.0, length_s + 0.005, 0.01).tolist()
    samples = tuple(Sample(t, rate_bps, int(rate_bps * factor * t / 8 // size) * size, FULL, 0) for t in times)
    return replace(record_of(trace, length_s), samples=samples)


@pytest.mark.parametrize("mbps", SLOW_MBPS)
def test_a_slow_link_that_follows_its_trace_is_valid_whatever_the_grain_of_its_packets(mbps):
    trace = Trace("slow", [1.0], [mbps * 1e6])
    for length_s in (2.0, 3.7, 10.0):
        verdict = judge(in_packets(mbps * 1e6, length_s), trace)
        assert verdict.state == "valid"
        assert verdict.coverage == pytest.approx(1.0, abs=0.02)
        assert verdict.total_error is not None


@pytest.mark.parametrize("mbps", SLOW_MBPS)
@pytest.mark.parametrize("factor", [0.5, 0.75, 1.25])
def test_a_slow_link_that_does_not_is_invalid_at_every_rate(mbps, factor):
    verdict = judge(in_packets(mbps * 1e6, 6.0, factor), Trace("slow", [1.0], [mbps * 1e6]))
    assert verdict.state == "invalid"
    assert not verdict.ok
    assert any("total bytes: error" in reason for reason in verdict.reasons)


def test_windows_widen_until_they_hold_enough_packets():
    record = in_packets(0.3e6, 10.0)
    found = windows(record, expected_bytes(record, Trace("slow", [1.0], [0.3e6])), 0.1)
    assert len(found) == 8
    assert all(window.expected_bytes >= 30 * 1514 for window in found)
    fast = windows(record_of(STEPS), expected_bytes(record_of(STEPS), STEPS), 0.1)
    assert max(window.end_s - window.start_s for window in fast) < 0.11


def test_too_few_packets_are_unjudged_and_never_valid():
    verdict = judge(in_packets(0.1e6, 0.7, 0.5), Trace("slow", [1.0], [0.1e6]))
    assert (verdict.state, verdict.ok, verdict.total_error) == ("unjudged", False, None)
    assert verdict.coverage == pytest.approx(0.0, abs=0.02)
    [reason] = verdict.reasons
    assert "unjudged: 0% of the session could be judged (at least 50%)" in reason
    assert "for 6 packets, and 10 are needed" in reason


def flickering(record: LinkRecord, full: int) -> LinkRecord:
    """The same link with its queue empty at each sample but `full` in turn."""
    samples = (
        sample if i % (full + 1) else sample._replace(backlog_bytes=0) for i, sample in enumerate(record.samples)
    )
    return replace(record, samples=tuple(samples))


@pytest.mark.parametrize("full", [2, 3, 4])
@pytest.mark.parametrize(("factor", "state"), [(1.0, "valid"), (0.5, "invalid"), (0.8, "invalid"), (1.25, "invalid")])
def test_a_queue_that_empties_all_the_time_is_judged_by_all_its_pieces(full, factor, state):
    verdict = judge(flickering(record_of(STEPS, factor=factor), full), STEPS)
    assert (verdict.state, verdict.coverage) == (state, 1.0)
    assert verdict.windows == 0
    assert verdict.total_error == pytest.approx(abs(factor - 1.0), abs=5e-3)
    assert factor == 1.0 or "total bytes: error" in verdict.reasons[0]


@pytest.mark.parametrize("mbps", [1.0, 3.0, 12.0, 40.0])
@pytest.mark.parametrize("full", [2, 3, 4])
def test_the_grain_of_many_pieces_makes_no_good_link_invalid(mbps, full):
    trace = Trace("slow", [1.0], [mbps * 1e6])
    for length_s in np.arange(1.0, 4.0, 0.17).tolist():
        assert judge(flickering(in_packets(mbps * 1e6, length_s), full), trace).state != "invalid"


def test_short_pieces_do_not_hide_the_error_of_long_ones():
    """Half a second at 0.96 of the trace, and then pieces that make up for it."""
    good, slow = (in_packets(12e6, 2.0, factor).samples for factor in (1.0, 0.96))
    lost = good[50].delivered_bytes - slow[50].delivered_bytes
    pieces = flickering(in_packets(12e6, 2.0), 3).samples
    later = tuple(one._replace(delivered_bytes=one.delivered_bytes - lost) for one in pieces[51:])
    record = replace(in_packets(12e6, 2.0), samples=slow[:51] + later)
    verdict = judge(record, Trace("slow", [1.0], [12e6]))
    assert verdict.state == "invalid"
    assert any("total bytes in pieces of 50 ms and more: error 4." in reason for reason in verdict.reasons)


def test_pieces_of_few_packets_are_unjudged():
    verdict = judge(flickering(in_packets(0.6e6, 1.0), 5), Trace("slow", [1.0], [0.6e6]))
    assert verdict.state == "unjudged"
    assert "for 33 packets in 17 pieces, and 41 are needed" in verdict.reasons[0]


def test_many_pieces_of_less_than_a_packet_do_not_hide_a_long_one():
    slow = in_packets(0.1e6, 5.0)
    pieces = flickering(slow, 3).samples
    verdict = judge(replace(slow, samples=slow.samples[:300] + pieces[300:]), Trace("slow", [1.0], [0.1e6]))
    assert verdict.state == "valid"
    assert verdict.backlogged_s == pytest.approx(3.0, abs=0.03)
    assert verdict.coverage == pytest.approx(1.0 - 2.0 / 2 / 5.0, abs=0.02)


def test_what_was_judged_is_said():
    half = tuple(
        sample if sample.t_s < 0.5 else sample._replace(backlog_bytes=0) for sample in record_of(STEPS).samples
    )
    verdict = judge(record_of(STEPS, samples=half), STEPS)
    assert (verdict.state, verdict.coverage) == ("valid", 1.0)
    assert verdict.full_s == pytest.approx(0.5, abs=0.02)
    assert verdict.backlogged_s == pytest.approx(0.5, abs=0.02)


def test_a_link_that_is_faster_than_its_trace_is_invalid_though_it_is_never_full():
    verdict = judge(record_of(STEPS, factor=1.5, backlog=0), STEPS)
    assert verdict.state == "invalid"
    assert "bytes more than the trace carries passed a queue that was not full" in verdict.reasons[0]


def test_an_outage_that_lets_bytes_through_is_invalid():
    trace = Trace("outage", [0.2, 0.6, 0.2], [20e6, 0.0, 20e6])
    leaking = Trace("leaking", [0.2, 0.6, 0.2], [20e6, 1e6, 20e6])
    verdict = judge(record_of(leaking), trace)
    assert verdict.state == "invalid"
    dark = judge(record_of(Trace("leak", [1.0], [1e6])), Trace("dark", [1.0], [0.0]))
    assert "125000 bytes passed while the trace carries nothing (limit 3028)" in dark.reasons[0]


@pytest.mark.parametrize(
    ("cpu", "valid"),
    [
        (CpuSample(1.0, 0.0, 0.4, 1.6, 0.05), False),  # two hogs on two processors; what runs hardly waits
        (CpuSample(1.0, 0.9, 0.1, 1.0, 0.0), True),  # one hog: the other processor is free
        (CpuSample(1.0, 0.0, 1.9, 0.1, 0.05), True),  # the run itself is busy
        (CpuSample(1.0, 1.6, 0.3, 0.1, 0.0), True),  # quiet
    ],
)
def test_programs_that_take_every_processor_are_contention(cpu, valid):
    verdict = judge(record_of(STEPS, cpu=(cpu,)), STEPS)
    assert verdict.ok == valid
    if not valid:
        assert "other programs used 1.60 processors while none was idle (limit 0.25)" in verdict.reasons[0]
        assert verdict.crowded == pytest.approx(1.6)


def test_a_run_with_real_time_priority_is_crowded_by_other_machines_alone():
    hogs, stolen = CpuSample(1.0, 0.0, 0.4, 1.6, 0.05, 0.1), CpuSample(1.0, 0.0, 0.4, 1.6, 0.05, 0.9)
    granted = {"scheduling": "SCHED_RR 3"}
    assert judge(record_of(STEPS, cpu=(hogs,), settings=granted), STEPS).crowded == pytest.approx(0.1)
    assert judge(record_of(STEPS, cpu=(hogs,), settings={"scheduling": "nice 0"}), STEPS).crowded == pytest.approx(1.6)
    verdict = judge(record_of(STEPS, cpu=(stolen,), settings=granted), STEPS)
    assert "other programs used 0.90 processors while none was idle (limit 0.25)" in verdict.reasons[0]


def test_a_record_survives_json():
    record = record_of(STEPS, cpu=(CpuSample(0.1, 0.1, 0.0, 0.1, 0.0),), faults=("x",))
    assert LinkRecord.from_json(record.to_json()) == record


def test_rows_carry_capacity_queue_and_lateness():
    rows = record_of(STEPS).rows()
    assert len(rows) == 101
    assert rows[35]["capacity_bps"] == 50e6
    assert rows[35]["lateness_s"] == pytest.approx(0.0001)
    assert rows[35]["queue_bytes"] == FULL


@pytest.mark.parametrize(
    ("link", "rates", "size"),
    [
        (LinkSettings(), [1e6, 20e6], 1500),
        (LinkSettings(), [100e6, 10e9], 12_500),
        (LinkSettings(), [3e9], 65_536),
        (LinkSettings(), [0.0, 1e9], 65_536),
        (LinkSettings(offloads=False), [3e9], 1500),
        (LinkSettings(loss=0.01), [3e9], 1500),
        (LinkSettings(delay_s=0.01, jitter_s=0.005), [3e9], 65_536),
        (LinkSettings(delay_s=0.01, jitter_s=0.005, jitter_order=False), [3e9], 1500),
    ],
)
def test_packets_are_sized_to_the_rates(link, rates, size):
    assert link.gso_bytes([Trace("t", [1.0] * len(rates), rates)]) == size
