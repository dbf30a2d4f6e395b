"""Does the additive distortion that policies minimise say what a session's cache is worth to the model?

    python benchmarks/surrogate.py [--contexts NAME ...] [--sessions N] [--out FILE.json]

Sessions with mixed levels over simulated links: policies that mix levels, on traces and deadlines that make them, under
each codec. The cache of every session is then put together from the encoded chunks that it chose (text is exact), the
bundled model answers the context's questions over it, and the mean KL divergence from the exact cache is measured
(`measured_kl`). Printed: Spearman's rank correlation of `distortion` and `measured_kl` within each context and codec, and
over all sessions. The bar is 0.8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from policies.api import TEXT  # noqa: E402
from testbed import machine, plugs, prepare  # noqa: E402
from testbed.compute import Compute, set_threads  # noqa: E402
from testbed.llm import SIDE_BY_SIDE_TOKENS, Model, mean_kl  # noqa: E402
from testbed.session import Costs, SessionFailed  # noqa: E402
from testbed.simulator import simulate  # noqa: E402
from testbed.store import Store, chunk_id  # noqa: E402
from traces.framing import goodput_per_capacity  # noqa: E402
from traces.resolve import open_trace  # noqa: E402

CODECS = ("kvstream", "cachegen", "uniform")
CHUNK_TOKENS = 256
POLICIES = ("random", "random,text=true", "cachegen", "buffer-based", "bola", "mpc", "kvstream")
TRACES = (
    "uniform,low=3Mbps,high=60Mbps,hold=0.2s,seed=3",
    "step-down-up,scale_mean=25Mbps",
    "lte-walk,scale_mean=20Mbps",
    "family/markov-003,scale_mean=30Mbps",
    "wifi,scale_mean=50Mbps",
)
DEADLINES_S = (0.5, 1.0, 2.0)
BAR = 0.8


def sessions(manifest: Any, costs: Costs, most: int) -> list[tuple[str, tuple[Any, ...], float]]:
    """(policy, levels, distortion) of sessions that mixed levels, each mixture once, in a fixed order."""
    units = list(itertools.product(POLICIES, TRACES, DEADLINES_S))
    random.Random(1).shuffle(units)
    found: dict[tuple[Any, ...], tuple[str, float]] = {}
    for seed, (policy, trace, deadline_s) in enumerate(units):
        goodput = open_trace(trace).scaled(goodput_per_capacity())
        try:
            record = simulate(
                manifest, plugs.make_policy(policy), goodput, deadline_s=deadline_s, costs=costs, rtt_s=0.02, seed=seed
            )
        except SessionFailed:
            continue
        if len(set(record.levels)) > 1:
            found.setdefault(record.levels, (policy, record.distortion))
    return [(policy, levels, distortion) for levels, (policy, distortion) in found.items()][:most]


def measure(names: list[str], most: int) -> list[dict[str, Any]]:
    """A row a session."""
    set_threads(None)
    prepared = prepare.prepare("bundled", names, CODECS, CHUNK_TOKENS, lambda line: print(line, file=sys.stderr))
    store, compute = Store(prepared.path, create=False), Compute(Model.load(prepared.model))
    rows = []
    try:
        for (name, codec), key in prepared.ids.items():
            manifest, questions, exact = prepared.manifests[name, codec], store.questions(key), store.reference(key)
            if manifest.profile is not None:
                compute.add_profile(store.profile(manifest.profile))
            compute.reserve(manifest.tokens + SIDE_BY_SIDE_TOKENS + 64)
            compute.open(manifest, SIDE_BY_SIDE_TOKENS)
            steps = [tuple(0.004 for _ in manifest.levels)] * len(manifest.chunks)
            costs = Costs(tuple(steps), (0.08,) * len(manifest.chunks), 0.03)
            for policy, levels, distortion in sessions(manifest, costs, most):
                for chunk, level in enumerate(levels):
                    data = memoryview(bytearray(store.get_kv(chunk_id(key, chunk), level)))
                    if level == TEXT:
                        compute.recompute(chunk, data)
                    else:
                        compute.decode(chunk, level, data)
                score = compute.ask(questions)
                rows.append({
                    "context": name, "codec": codec, "policy": policy, "levels": list(levels),
                    "distortion": distortion, "measured_kl": mean_kl(exact, score.log_probs),
                    "right": sum(score.right), "answers": len(questions),
                })  # fmt: skip
            print(f"{name} {codec}: {sum(r['context'] == name and r['codec'] == codec for r in rows)} sessions",
                  file=sys.stderr, flush=True)  # fmt: skip
    finally:
        compute.close()
    return rows


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation by context and codec, by codec, and over all."""
    from scipy.stats import spearmanr

    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for group in (f"{row['context']} {row['codec']}", row["codec"], "all"):
            groups[group].append(row)
    found = {}
    for group, members in sorted(groups.items()):
        correlation = spearmanr([r["distortion"] for r in members], [r["measured_kl"] for r in members]).statistic
        ratio = [r["measured_kl"] / r["distortion"] for r in members if r["distortion"] > 0.0]
        found[group] = {
            "sessions": len(members),
            "spearman": float(correlation),
            "measured_over_distortion_p50": float(np.median(ratio)),
        }
    return {"groups": found, "bar": BAR, "ok": found["all"]["spearman"] >= BAR}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", default=["docs", "prose", "code"], help="shipped contexts")
    parser.add_argument("--sessions", type=int, default=25, help="at most so many for each context and codec")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    rows = measure(args.contexts, args.sessions)
    result = judge(rows)
    print(f"{'':20} {'sessions':>8} {'Spearman':>9} {'measured KL / distortion':>25}")
    for name, group in result["groups"].items():
        print(f"{name:20} {group['sessions']:8} {group['spearman']:9.3f} {group['measured_over_distortion_p50']:25.2f}")
    print(f"bar {BAR}: {'met' if result['ok'] else 'MISSED'}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result | {"rows": rows} | machine.describe(), indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
