"""What the simulator and the oracle make of a link."""

from __future__ import annotations

import pytest

from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.simulator import link_model
from kvstream.traces.trace import Trace

PLAIN = Trace("plain", [1.0], [20e6])
FAR = Trace("far", [3.0, 1.0], [20e6, 20e6], delay_s=[0.01, 0.05], loss=[0.0, 0.1])
STEADY = Trace("steady", [3.0, 1.0], [20e6, 20e6], delay_s=[0.03, 0.03], loss=[0.0, 0.0])
SHORT = "lets TCP fill links whose queue is shorter than the bandwidth-delay product"
CHUNKS = Trace("chunks", [], [20e6, 20e6], per="chunk", delay_s=[0.01, 0.05])


@pytest.mark.parametrize(("trace", "mean_s"), [(PLAIN, 0.0), (FAR, 0.02), (STEADY, 0.03), (CHUNKS, 0.03)])
def test_a_round_trip_has_the_mean_of_the_trace_s_delays(trace, mean_s):
    assert trace.mean_delay_s == pytest.approx(mean_s)
    assert link_model.round_trip_s(trace, LinkSettings(delay_s=0.005)) == pytest.approx(2 * (0.005 + mean_s))


def test_goodput_is_that_of_the_link_s_packets():
    assert link_model.goodput(PLAIN, LinkSettings(mtu=9000)).mean_bps == pytest.approx(20e6 * 8948 / 9014)


def test_what_the_time_before_carried():
    steps = Trace("steps", [1.0, 1.0], [20e6, 0.0])
    carried = [link_model.carried_bps(steps, LinkSettings(mtu=9000), at_s, 0.5) for at_s in (0.0, 0.4, 1.0, 1.25, 1.5)]
    framing = 8948 / 9014
    assert carried == [None, None, *(pytest.approx(rate * framing) for rate in (20e6, 10e6)), None]
    assert link_model.carried_bps(CHUNKS, LinkSettings(), 1.0, 0.5) is None


@pytest.mark.parametrize(
    ("traces", "link", "says"),
    [
        ([PLAIN, STEADY], LinkSettings(queue_s=0.1), ""),
        ([PLAIN, STEADY], LinkSettings(), SHORT),
        ([PLAIN], LinkSettings(delay_s=0.025), ""),
        ([PLAIN], LinkSettings(delay_s=0.026), SHORT),
        ([PLAIN], LinkSettings(delay_s=0.02, queue_bytes=100_000), ""),
        ([PLAIN], LinkSettings(delay_s=0.02, queue_bytes=99_999), SHORT),
        ([PLAIN], LinkSettings(loss=0.01), "omits losses"),
        ([CHUNKS], LinkSettings(queue_s=0.1), "replaces varying delays by their mean"),
        ([PLAIN, FAR], LinkSettings(), "replaces varying delays by their mean and omits losses"),
        ([PLAIN], LinkSettings(delay_s=0.01, jitter_s=0.001), "replaces varying delays by their mean"),
        ([PLAIN], LinkSettings(cross_flows=2, duplicate=0.01), "omits cross traffic, duplicates"),
        ([FAR], LinkSettings(queue_s=0.01), f"replaces varying delays by their mean, {SHORT} and omits losses"),
    ],
)
def test_omissions_are_named(traces, link, says):
    assert link_model.left_out(traces, [link]) == says
