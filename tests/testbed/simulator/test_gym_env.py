"""The Gymnasium environment: the contract of the API, the simulator's own sessions, policies that leave it as files."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra [gym]")

from kvstream.policies import features  # noqa: E402
from kvstream.policies.api import TEXT, Choice, Observation  # noqa: E402
from kvstream.testbed.errors import SpecError  # noqa: E402
from kvstream.testbed.session.settings import SessionSettings  # noqa: E402
from kvstream.testbed.simulator.gym_env import KVStreamEnv, tuning_traces  # noqa: E402
from kvstream.testbed.simulator.simulator import simulate  # noqa: E402
from kvstream.traces.framing import goodput_per_capacity  # noqa: E402
from kvstream.traces.resolve import open_trace  # noqa: E402
from tests.pages import ROOT  # noqa: E402
from tests.policies.observations import arrived, observation  # noqa: E402

UNIT = {"trace": "step-down-up,scale_mean=16Mbps", "offset_s": 0.0, "deadline_s": 1.0, "rtt_s": 0.04}


def episode(env: KVStreamEnv, actions: Any, **options: Any) -> tuple[list[float], dict[str, Any], list[Any]]:
    obs, _ = env.reset(seed=1, options=UNIT | options)
    rewards, seen = [], [obs]
    for action in actions:
        obs, reward, over, cut, info = env.step(action)
        rewards.append(reward)
        seen.append(obs)
        assert not cut
        if over:
            return rewards, info, seen
    raise AssertionError("the episode did not end")


class Plan:
    def __init__(self, levels: list[Any]) -> None:
        self.levels = levels
        self.seen: list[Observation] = []

    def choose(self, obs: Observation) -> Choice:
        self.seen.append(obs)
        return Choice(self.levels[obs.chunk])


def test_environment_keeps_gymnasium_s_contract():
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("kvstream.testbed.simulator.gym_env:KVStream-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_an_episode_is_the_session_that_the_simulator_runs():
    env = KVStreamEnv()
    n, levels = len(env.manifest.chunks), env.n_levels
    actions = [i % (levels + 1) for i in range(n)]
    rewards, info, seen = episode(env, actions)
    plan = Plan([TEXT if a == levels else a for a in actions])
    record = simulate(
        env.manifest,
        plan,
        open_trace(UNIT["trace"]).scaled(goodput_per_capacity()),
        SessionSettings(1.0),
        costs=env.costs,
        rtt_s=0.04,
    )
    assert info == {"met": record.met, "ttft_s": record.ttft_s, "distortion": record.distortion}
    lowest = env.manifest.levels[0].distortion
    assert sum(rewards) == pytest.approx(-record.distortion / lowest - (0.0 if record.met else 6.0))
    assert len(rewards) == n
    for told, obs in zip(seen, plan.seen, strict=False):
        assert np.array_equal(told, features.features(obs))


def test_a_missed_deadline_costs():
    env = KVStreamEnv(miss=6.0)
    n = len(env.manifest.chunks)
    late, info, _ = episode(env, [env.n_levels - 1] * n, deadline_s=0.05)
    assert not info["met"]
    assert late[-1] < -6.0 < late[-2]
    in_time, info, _ = episode(env, [0] * n, deadline_s=30.0)
    assert info["met"]
    assert sum(in_time) == pytest.approx(-1.0)


def test_text_without_a_model_counts_as_the_smallest_level():
    from dataclasses import replace

    whole = KVStreamEnv()
    env = KVStreamEnv(offer=(whole.manifest, replace(whole.costs, recompute_s=None)))
    _, as_text, _ = episode(env, [env.n_levels] * len(env.manifest.chunks))
    _, smallest, _ = episode(env, [0] * len(env.manifest.chunks))
    assert as_text == smallest


def test_units_are_drawn_from_the_tuning_half():
    env = KVStreamEnv()
    names = tuning_traces()
    drawn = [env.reset(seed=i)[1] for i in range(20)]
    assert {unit["trace"] for unit in drawn} <= set(names)
    assert len({unit["trace"] for unit in drawn}) > 5
    assert drawn[3] == env.reset(seed=3)[1]


def test_what_is_not_shipped_is_said():
    with pytest.raises(SpecError, match="not shipped"):
        KVStreamEnv("nowhere")


@pytest.mark.parametrize(
    "obs",
    [
        observation(),
        observation(now_s=5.0, recompute=0.1),
        observation(done=3, transfers=arrived(3, 1e6), recompute=0.0),
        observation(transfers=arrived(1, 1e-3)),
        observation(prior_bps=1e12),
        observation(sizes=(1,), deadline_s=1e-9),
    ],
)
def test_features_stay_in_their_range(obs):
    found = features.features(obs)
    assert found.shape == (features.length(obs.n_levels),)
    assert np.isfinite(found).all()
    assert (np.abs(found) <= 1.0).all()


def test_features_do_not_know_units():
    """A link, contexts and deadlines ten times as large look the same."""
    small = observation(transfers=arrived(2, 1e6), done=2, recompute=0.1)
    large = observation(
        sizes=(1_000_000, 2_000_000, 4_000_000), transfers=arrived(2, 1e7, size=1_000_000), done=2, recompute=0.1
    )
    assert features.features(small) == pytest.approx(features.features(large), abs=1e-6)


def test_an_exported_policy_chooses_as_the_agent_does(tmp_path):
    stable_baselines3 = pytest.importorskip("stable_baselines3", reason="needs the extra [rl]")
    spec = importlib.util.spec_from_file_location("train_ppo", ROOT / "examples" / "train_ppo.py")
    assert spec is not None
    assert spec.loader is not None
    train_ppo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_ppo)
    env = KVStreamEnv()
    agent = stable_baselines3.PPO("MlpPolicy", env, policy_kwargs={"net_arch": train_ppo.HIDDEN}, seed=3, device="cpu")
    file = tmp_path / "exported.py"
    file.write_text(train_ppo.policy_file(agent, 0))
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(file.read_text(), str(file), "exec", dont_inherit=True), names)
    plan = Plan([0] * len(env.manifest.chunks))
    simulate(
        env.manifest,
        plan,
        open_trace(UNIT["trace"]).scaled(goodput_per_capacity()),
        SessionSettings(1.0),
        costs=env.costs,
    )
    policy = names["Learned"]()
    for obs in plan.seen:
        action, _ = agent.predict(features.features(obs), deterministic=True)
        level = policy.choose(obs).level
        assert level == (TEXT if action == env.n_levels else int(action))


def test_the_shipped_policy_was_worth_learning():
    """Better than the smallest level, and than drawing levels, on units that it was not trained on."""
    from kvstream.testbed.config import build
    from kvstream.testbed.workloads import precomputed
    from kvstream.traces import library

    offer = precomputed.load("docs", "kvstream")
    assert offer is not None
    names = [name for family in library.families("held-out") for name in library.family_names(family, "held-out")[:2]]
    cost: dict[str, float] = {}
    for policy in (f"{ROOT / 'examples' / 'ppo_policy.py'}:Learned", "lowest", "random,text=true"):
        total = 0.0
        for name in names:
            record = simulate(
                offer.manifest,
                build.make_policy(policy),
                open_trace(name).scaled(precomputed.FAMILY_RATES * goodput_per_capacity()),
                SessionSettings(1.0, seed=1),
                costs=offer.costs,
            )
            assert record.policy_faults == 0
            total += record.distortion / offer.manifest.levels[0].distortion + 6.0 * (not record.met)
        cost[policy] = total
    learned, lowest, drawn = cost.values()
    assert learned < lowest
    assert learned < drawn
