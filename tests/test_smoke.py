"""Does it work at all: one look into every room, in seconds. Run alone by scripts/smoke.sh."""

from __future__ import annotations

import pytest


def test_a_trace_carries_bits():
    from traces.resolve import open_trace

    trace = open_trace("uniform,low=10Mbps,high=50Mbps,hold=0.2s,seed=7")
    assert trace.bits_by(trace.time_for(8e6, 0.3) + 0.3) - trace.bits_by(0.3) == pytest.approx(8e6)


def test_every_policy_can_be_built():
    from policies import registry

    for name in registry.POLICIES:
        assert callable(registry.make(name).choose)


def test_a_session_is_simulated():
    from testbed.plugs import make_policy
    from testbed.simulator import simulate
    from tests.testbed import made

    manifest = made.even()
    record = simulate(
        manifest, make_policy("buffer-based"), made.constant(20e6), deadline_s=1.0, costs=made.costs(manifest)
    )
    assert len(record.levels) == len(manifest.chunks)
    assert record.met


def test_the_experiment_of_the_main_job_is_sound():
    from testbed import experiment, plugs
    from traces.resolve import open_trace

    main = experiment.load(experiment.MAIN_JOB)
    for name in main.traces:
        assert open_trace(name).mean_bps > 0
    for scheme in main.schemes:
        plugs.make_policy(scheme.policy)
    assert len({unit.unit_id for unit in main.units()}) == len(main.units())


def test_the_command_line_answers(capsys):
    from testbed.cli import main

    assert main(["policy", "list"]) == 0
    assert "buffer-based" in capsys.readouterr().out
    assert main(["simulate", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err
