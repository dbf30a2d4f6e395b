"""What the simulator and the oracle make of a link."""

from __future__ import annotations

import pytest

from testbed import ideal
from testbed.emulator.link import LinkSettings
from traces.trace import Trace

PLAIN = Trace("plain", [1.0], [20e6])
FAR = Trace("far", [3.0, 1.0], [20e6, 20e6], delay_s=[0.01, 0.05], loss=[0.0, 0.1])
STEADY = Trace("steady", [3.0, 1.0], [20e6, 20e6], delay_s=[0.03, 0.03], loss=[0.0, 0.0])
CHUNKS = Trace("chunks", [], [20e6, 20e6], per="chunk", delay_s=[0.01, 0.05])


@pytest.mark.parametrize(("trace", "mean_s"), [(PLAIN, 0.0), (FAR, 0.02), (STEADY, 0.03), (CHUNKS, 0.03)])
def test_a_round_trip_has_the_mean_of_the_trace_s_delays(trace, mean_s):
    assert trace.mean_delay_s == pytest.approx(mean_s)
    assert ideal.round_trip_s(trace, LinkSettings(delay_s=0.005)) == pytest.approx(2 * (0.005 + mean_s))


def test_goodput_is_that_of_the_link_s_packets():
    assert ideal.goodput(PLAIN, LinkSettings(mtu=9000)).mean_bps == pytest.approx(20e6 * 8948 / 9014)


@pytest.mark.parametrize(
    ("traces", "link", "says"),
    [
        ([PLAIN, STEADY], LinkSettings(), ""),
        ([PLAIN], LinkSettings(loss=0.01), "does not know of losses"),
        ([CHUNKS], LinkSettings(), "takes varying delays at their mean"),
        ([PLAIN, FAR], LinkSettings(), "takes varying delays at their mean and does not know of losses"),
        ([PLAIN], LinkSettings(delay_s=0.01, jitter_s=0.001), "takes varying delays at their mean"),
        ([PLAIN], LinkSettings(cross_flows=2, duplicate=0.01), "does not know of cross traffic, duplicates"),
    ],
)
def test_what_is_left_out_is_said(traces, link, says):
    assert ideal.left_out(traces, [link]) == says
