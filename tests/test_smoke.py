"""Does it work at all: one look into every room, in seconds. Run alone by scripts/smoke.sh."""

from __future__ import annotations

import itertools

import pytest


def test_a_trace_carries_bits():
    from kvstream.traces.resolve import open_trace

    trace = open_trace("uniform,low=10Mbps,high=50Mbps,hold=0.2s,seed=7")
    assert trace.bits_by(trace.time_for(8e6, 0.3) + 0.3) - trace.bits_by(0.3) == pytest.approx(8e6)


def test_every_policy_chooses_what_the_observation_offers():
    from kvstream.policies import registry
    from kvstream.policies.api import TEXT, Choice, Forecast
    from kvstream.testbed.session.settings import SessionSettings
    from kvstream.testbed.simulator.simulator import simulate
    from tests.testbed import made

    seen = []

    class Watcher:
        def choose(self, obs):
            seen.append(obs)
            return Choice(1)

    manifest, link = made.even(), made.constant(20e6)
    simulate(manifest, Watcher(), link, SessionSettings(1.0), costs=made.costs(manifest), rtt_s=0.02)
    assert seen[-1].transfers
    for name, obs in itertools.product(registry.POLICIES, (seen[0], seen[-1])):
        policy = registry.make(name)
        if registry.is_clairvoyant(policy):
            policy.foresee(Forecast(link, 0.02, 2))
        choice = policy.choose(obs)
        assert choice.level in (TEXT, *range(obs.n_levels)), name
        assert choice.chunk in (None, *obs.remaining), name


def test_a_session_is_simulated():
    from kvstream.testbed.config.build import make_policy
    from kvstream.testbed.session.settings import SessionSettings
    from kvstream.testbed.simulator.simulator import simulate
    from tests.testbed import made

    manifest = made.even()
    record = simulate(
        manifest, make_policy("buffer-based"), made.constant(20e6), SessionSettings(1.0), costs=made.costs(manifest)
    )
    assert len(record.levels) == len(manifest.chunks)
    assert record.met


def test_the_experiment_of_the_main_job_is_sound():
    from kvstream.testbed.config import build, experiment
    from kvstream.traces.resolve import open_trace

    main = experiment.load(experiment.MAIN_JOB)
    for unit in main.units():
        assert open_trace(unit.trace).mean_bps > 0
    for scheme in main.schemes:
        build.make_policy(scheme.policy)
    assert len({unit.unit_id for unit in main.units()}) == len(main.units())


def test_the_command_line_answers(capsys):
    from kvstream.testbed.cli import main

    assert main(["policy", "list"]) == 0
    assert "buffer-based" in capsys.readouterr().out
    assert main(["simulate", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err
