"""The verdict on a link, on records made up here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.emulator.fidelity import Limits, expected_bytes, judge, starvation, windows
from testbed.emulator.link import LinkSettings
from testbed.emulator.record import Change, CpuSample, LinkRecord, Sample
from traces.trace import Trace

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


def test_a_link_that_does_what_its_trace_says_is_ok():
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
        ({"cpu": (CpuSample(1.0, 0.0, 0.5, 1.5, 1.0),)}, "waited 0.75 s a second"),
        ({"impairments": {"lost_by_kernel": 3}}, "the kernel dropped 3 packets on their way to the element"),
    ],
)
def test_each_kind_of_trouble_is_a_reason(fields, words):
    verdict = judge(record_of(STEPS, **fields), STEPS)
    assert not verdict.ok
    assert any(words in reason for reason in verdict.reasons)


@pytest.mark.parametrize("done", [{"backend": "netem", "dropped": 5}, {"dropped": 5, "lost_by_kernel": 0}])
def test_what_was_lost_as_asked_for_is_told_and_no_trouble(done):
    verdict = judge(record_of(STEPS, impairments=done), STEPS)
    assert verdict.ok
    assert verdict.to_json()["impairments"] == done


def test_waiting_for_oneself_is_no_starvation():
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
