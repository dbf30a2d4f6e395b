"""Sessions of an experiment in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.config import experiment
from kvstream.testbed.results.folder import Run
from kvstream.testbed.run import simulated
from kvstream.testbed.workloads import precomputed


@pytest.mark.parametrize(
    ("trace", "first_bps"),
    [
        ("constant,rate=20Mbps", 20e6),
        ("uniform,low=7Mbps,high=7Mbps,per=chunk", 7e6),
        ("constant,rate=20Mbps", None),
    ],
)
def test_a_probe_tells_the_rate_at_the_start(tmp_path, trace, first_bps):
    assert prior_of(tmp_path, trace, probe=first_bps is not None) == [
        pytest.approx(first_bps * 1448 / 1514) if first_bps else None
    ]


def test_what_a_session_just_before_got_carries_over(tmp_path):
    """A second at 10 Mbit/s and one at 30, again and again."""
    trace, offsets = "step,rates=10Mbps:30Mbps,hold=1s,end=loop", [0.0, 0.4, 0.5, 1.0, 1.25]
    found = prior_of(tmp_path, trace, carry_over=True, offsets_s=offsets, deadlines_s=[0.5])
    framing = 1448 / 1514
    assert found == [None, None, *(pytest.approx(rate * framing) for rate in (10e6, 10e6, 20e6))]


def prior_of(folder: Path, trace: str, **settings: Any) -> list[float | None]:
    """`prior_bps` of each unit's session."""
    made = experiment.from_dict(
        {"name": "prior", "contexts": ["docs"], "traces": [trace], "deadlines_s": [2.0],
         "schemes": [{"policy": "throughput", "codec": "uniform"}]} | settings
    )  # fmt: skip
    run = Run(folder / "run")
    simulated.run_simulated(made, run, quiet=True)
    rows = sorted((cell["row"] for cell in run.load_cells()), key=lambda row: row["offset_s"])
    assert all(row["status"] == "ok" for row in rows)
    return [row["prior_bps"] for row in rows]


@pytest.mark.parametrize("compiled_from", [0, simulated.COMPILED_FROM])
def test_compute_varies_alike_for_all_schemes_of_a_unit(tmp_path, monkeypatch, compiled_from):
    """Their last chunk, of one size, takes as much to decode in each; without noise, what was estimated."""
    monkeypatch.setattr(simulated, "COMPILED_FROM", compiled_from)
    took = {}
    for noise in (True, False):
        made = experiment.from_dict(
            {
                "name": f"noise-{noise}",
                "contexts": ["docs"],
                "traces": ["constant,rate=20Mbps"],
                "deadlines_s": [1.0, 2.0],
                "noise": noise,
                "schemes": [
                    {"policy": "fixed,level=lowest", "codec": "kvstream"},
                    {"policy": "fixed,level=lowest", "codec": "kvstream", "depth": 1},
                ],
            }
        )
        run = Run(tmp_path / made.name)
        simulated.run_simulated(made, run, quiet=True)
        for cell in run.load_cells():
            row, last = cell["row"], cell["chunks"][-1]
            took[noise, row["deadline_s"], row["depth"]] = last["decode_end_s"] - last["decode_start_s"]
    offer = precomputed.load("docs", "kvstream")
    assert offer is not None
    estimate = pytest.approx(offer.costs.decode_s[-1][0])
    for deadline_s in (1.0, 2.0):
        assert took[True, deadline_s, 1] == pytest.approx(took[True, deadline_s, 2])
        assert took[True, deadline_s, 2] != estimate == took[False, deadline_s, 2]
    assert took[True, 1.0, 2] != pytest.approx(took[True, 2.0, 2])


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
            "links": ["queue=0.2s", "delay_s=0.02,mtu=1500,queue=0.2s"],
            "deadlines_s": [2.0],
            "noise": False,
            "schemes": [{"policy": "fixed,level=lowest", "codec": "uniform"}],
        }
    )
    run = Run(tmp_path / "far")
    simulated.run_simulated(made, run, quiet=False)
    says = "replaces varying delays by their mean and omits losses"
    assert f"it {says}" in capsys.readouterr().out.splitlines()[0]
    assert run.manifest["simplified"] == f"the simulator {says}"
    ttft_s = {(row["trace"], row["link"]): row["ttft_s"] for row in run.rows()}
    plain, columns, setting, both = (ttft_s[name, link] for link in made.links for name in ("near.csv", "far.csv"))
    assert plain < columns == pytest.approx(setting)
    assert both > columns
