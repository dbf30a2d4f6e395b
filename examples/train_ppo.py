"""Train a small PPO agent on simulated sessions and write it as a policy of its own: numpy and nothing else.

    pip install -e '.[rl]'
    python train_ppo.py --steps 60000 --out ppo_policy.py
    kvstream policy check ./ppo_policy.py:Learned
    kvstream simulate compare.toml --policy ./ppo_policy.py:Learned --policy cachegen --codec kvstream
    kvstream run compare.toml --policy ./ppo_policy.py:Learned --policy cachegen --codec kvstream

The agent trains on the `tune` halves of the trace families. Every command that takes a policy reads the file it writes,
which needs neither Gymnasium nor torch.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

HIDDEN = [32, 32]

FILE = '''"""A policy learned by PPO over {steps} chunks, by examples/train_ppo.py: {layers} layers, {numbers} numbers.

For contexts of {levels} levels; others, which it was not trained on, get the smallest one.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np

from kvstream import TEXT, Choice, Observation
from kvstream.policies.features import features

LEVELS = {levels}
WEIGHTS = """
{weights}
"""


@dataclass
class Learned:
    """The action with the highest score among those that are possible."""

    def __post_init__(self) -> None:
        stored = np.load(io.BytesIO(base64.b85decode("".join(WEIGHTS.split()))))
        self._layers = [(stored[f"w{{i}}"], stored[f"b{{i}}"]) for i in range(len(stored.files) // 2)]

    def choose(self, obs: Observation) -> Choice:
        if obs.n_levels != LEVELS:
            return Choice(0)
        values = features(obs)
        for weight, bias in self._layers[:-1]:
            values = np.tanh(weight @ values + bias)
        weight, bias = self._layers[-1]
        likes = weight @ values + bias
        if obs.recompute_s is None:
            likes[LEVELS] = -np.inf
        action = int(likes.argmax())
        return Choice(TEXT if action == LEVELS else action, reason={{"likes": float(likes[action])}})
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60_000, help="chunks to choose for, in all")
    parser.add_argument("--out", type=Path, default=Path("ppo_policy.py"), help="the policy's file")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    env = make_vec_env(
        lambda: gymnasium.make("kvstream.testbed.simulator.gym_env:KVStream-v0"), n_envs=8, seed=args.seed
    )
    agent = PPO(
        "MlpPolicy", env, n_steps=256, batch_size=256, gamma=1.0, ent_coef=0.003, learning_rate=1e-3,
        policy_kwargs={"net_arch": HIDDEN}, seed=args.seed, device="cpu",
    )  # fmt: skip
    agent.learn(args.steps)
    rewards = [step["r"] for step in agent.ep_info_buffer or ()]
    args.out.write_text(policy_file(agent, args.steps), encoding="utf-8")
    print(f"{args.out}: mean reward of the last {len(rewards)} sessions {np.mean(rewards):.3f}")


def policy_file(agent: PPO, steps: int) -> str:
    """The agent's network as the source of a policy."""
    network: Any = agent.policy
    linear = [layer for layer in [*network.mlp_extractor.policy_net, network.action_net] if hasattr(layer, "weight")]
    arrays = {}
    for index, layer in enumerate(linear):
        arrays[f"w{index}"] = layer.weight.detach().numpy().astype(np.float32)
        arrays[f"b{index}"] = layer.bias.detach().numpy().astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    text = base64.b85encode(buffer.getvalue()).decode()
    weights = "\n".join(text[i : i + 100] for i in range(0, len(text), 100))
    return FILE.format(
        steps=steps,
        layers=len(linear),
        numbers=sum(array.size for array in arrays.values()),
        levels=len(arrays[f"b{len(linear) - 1}"]) - 1,
        weights=weights,
    )


if __name__ == "__main__":
    main()
