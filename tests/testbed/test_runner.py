"""What a run over emulated links keeps; the sessions themselves are in tests/emulation."""

from __future__ import annotations

from testbed import runner
from testbed.results import Run

BEGUN = {"experiment": {"name": "x"}, "backend": "mininet", "schemes": [], "units": [], "kernel": "6.1"}


def test_a_run_that_goes_on_keeps_what_its_networks_said(tmp_path):
    run = Run(tmp_path / "run")
    assert runner._of_earlier_parts(run) == {"networks": {}}
    run.create(BEGUN | {"networks": {"delay=1ms": {"impairments": {}}}, "costs": {"docs": 1}})
    assert runner._of_earlier_parts(run) == {"networks": {"delay=1ms": {"impairments": {}}}, "costs": {"docs": 1}}
