"""Sessions of an experiment in the simulator."""

from __future__ import annotations

import pytest

from testbed import shipped, simulated
from testbed.experiment import Scheme, Unit
from traces.framing import goodput_per_capacity
from traces.resolve import open_trace


@pytest.mark.parametrize(
    ("trace", "first_bps"),
    [
        ("constant,rate=20Mbps", 20e6),
        ("uniform,low=7Mbps,high=7Mbps,per=chunk", 7e6),
        ("constant,rate=20Mbps", None),
    ],
)
def test_a_probe_tells_the_rate_at_the_start(trace, first_bps):
    offer = shipped.load("docs", "uniform")
    assert offer is not None
    goodput = open_trace(trace).scaled(goodput_per_capacity())
    unit = Unit(0, "docs", trace, 0.0, 2.0, "", 1)
    scheme = Scheme("throughput", "uniform")
    outcome = simulated._session(unit, scheme, offer.manifest, offer.costs, goodput, first_bps is not None)
    assert outcome.status == "ok"
    assert outcome.prior_bps == (pytest.approx(first_bps * 1448 / 1514) if first_bps else None)
