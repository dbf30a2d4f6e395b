"""Sessions of an experiment in the simulator."""

from __future__ import annotations

import pytest

from testbed import experiment, shipped, simulated
from testbed.experiment import Scheme, Unit
from testbed.results import Run
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
    outcome = simulated._session(unit, scheme, offer.manifest, offer.costs, goodput, 0.0, probe=first_bps is not None)
    assert outcome.status == "ok"
    assert outcome.prior_bps == (pytest.approx(first_bps * 1448 / 1514) if first_bps else None)


def test_a_trace_s_delays_and_losses_are_taken_as_far_as_said(tmp_path, capsys):
    """A delay of 20 ms in the trace counts like one in the link; what a fluid link cannot do is said first."""
    trace = tmp_path / "far.csv"
    trace.write_text("duration_s,rate_mbps,delay_ms,loss\n1,20,10,0.01\n1,20,30,0\n")
    (tmp_path / "near.csv").write_text("duration_s,rate_mbps\n2,20\n")
    made = experiment.from_dict(
        {
            "name": "far",
            "contexts": ["docs"],
            "traces": [str(trace), str(tmp_path / "near.csv")],
            "links": ["", "delay_s=0.02,mtu=1500"],
            "deadlines_s": [2.0],
            "schemes": [{"policy": "fixed,level=lowest", "codec": "uniform"}],
        }
    )
    run = Run(tmp_path / "far")
    simulated.run_simulated(made, run, quiet=False)
    says = "takes varying delays at their mean and does not know of losses"
    assert f"it {says}" in capsys.readouterr().out.splitlines()[0]
    assert run.manifest["simplified"] == f"the simulator {says}"
    ttft_s = {(row["trace"], row["link"]): row["ttft_s"] for row in run.rows()}
    plain, columns, setting, both = (
        ttft_s[str(tmp_path / name), link] for link in made.links for name in ("near.csv", "far.csv")
    )
    assert plain < columns == pytest.approx(setting)
    assert both > columns
