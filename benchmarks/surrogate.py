"""Does the additive distortion that policies minimise predict the quality of a session's cache?

    python benchmarks/surrogate.py [--contexts NAME ...] [--sessions N] [--out FILE.json]

Sessions with mixed levels over simulated links: policies that mix levels, on traces and deadlines that make them, under
each codec, for the shipped contexts. The cache of every session is put together from the encoded chunks that it chose
(text is exact), and what a run's results call `measured_kl` is measured on it as a receiver does: the KL divergence
from the exact cache over the first tokens that are read next, a passage of text and the answers to questions.

Printed: Spearman's rank correlation of `distortion` with `measured_kl`, by codec and over all sessions. The threshold
is 0.8 over all. Within a codec the sessions differ less, and the ranks agree less.
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

from kvstream.codec.api import Codec  # noqa: E402
from kvstream.policies.api import TEXT  # noqa: E402
from kvstream.testbed.config import build  # noqa: E402
from kvstream.testbed.encoding import calibrate, prepare  # noqa: E402
from kvstream.testbed.engine.loading import load_model  # noqa: E402
from kvstream.testbed.engine.model import SIDE_BY_SIDE_TOKENS, KVCache, Model, calculate_kv, mean_kl, score  # noqa: E402
from kvstream.testbed.engine.threads import set_threads  # noqa: E402
from kvstream.testbed.host import machine  # noqa: E402
from kvstream.testbed.session.costs import Costs  # noqa: E402
from kvstream.testbed.session.record import SessionFailed  # noqa: E402
from kvstream.testbed.session.settings import SessionSettings  # noqa: E402
from kvstream.testbed.simulator.simulator import simulate  # noqa: E402
from kvstream.testbed.store.manifest import ChunkInfo, LevelInfo, Manifest  # noqa: E402
from kvstream.testbed.store.questions import Question  # noqa: E402
from kvstream.traces.framing import goodput_per_capacity  # noqa: E402
from kvstream.traces.resolve import open_trace  # noqa: E402

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
THRESHOLD = 0.8


def sessions(manifest: Any, costs: Costs, most: int) -> list[tuple[str, tuple[Any, ...], float]]:
    """(policy, levels, distortion) of sessions that mixed levels, each mixture once, in a fixed order."""
    units = list(itertools.product(POLICIES, TRACES, DEADLINES_S))
    random.Random(1).shuffle(units)
    found: dict[tuple[Any, ...], tuple[str, float]] = {}
    for seed, (policy, trace, deadline_s) in enumerate(units):
        goodput = open_trace(trace).scaled(goodput_per_capacity())
        try:
            record = simulate(
                manifest,
                build.make_policy(policy),
                goodput,
                SessionSettings(deadline_s, seed=seed),
                costs=costs,
                rtt_s=0.02,
            )
        except SessionFailed:
            continue
        if len(set(record.levels)) > 1:
            found.setdefault(record.levels, (policy, record.distortion))
    return [(policy, levels, distortion) for levels, (policy, distortion) in found.items()][:most]


def encoded(codec: Codec, kv: Any, ladder: tuple[float, ...], model: Model) -> tuple[Manifest, list[list[bytes]]]:
    """A context as a sender would offer it, and [chunk][level] its bytes."""
    tokens = kv.shape[2]
    spans = [range(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS)]
    data = [
        [codec.encode(kv[:, :, span.start : span.stop], level, positions=span) for level in range(len(codec.levels))]
        for span in spans
    ]
    levels = tuple(LevelInfo(level.name, nats, 0.0) for level, nats in zip(codec.levels, ladder, strict=True))
    chunks = tuple(
        ChunkInfo(span.start, span.stop, tuple(len(one) for one in row), len(span))
        for span, row in zip(spans, data, strict=True)
    )
    return Manifest("check", model.fingerprint, codec.get_config(), None, model.kv, levels, chunks), data


def arrived(codec: Codec, exact: Any, manifest: Manifest, data: list[list[bytes]], levels: tuple[Any, ...]) -> Any:
    """The cache of a session."""
    found = exact.clone()
    for chunk, row, level in zip(manifest.chunks, data, levels, strict=True):
        if level != TEXT:
            codec.decode(row[level], found[:, :, chunk.start : chunk.stop])
    return found


def measure(names: list[str], most: int) -> list[dict[str, Any]]:
    """A row a session."""
    set_threads(None)
    model = load_model("bundled")
    codecs = {name: calibrate.make_codec(name, model) for name in CODECS}
    ladders = {name: calibrate.distortions(model, codec, CHUNK_TOKENS) for name, codec in codecs.items()}
    passage = calibrate.passage(model)
    rows = []
    for context in prepare.find_contexts(names):
        exact = calculate_kv(model, model.encode(context.text.decode()))
        questions = [
            Question(tuple(model.encode(q.prompt.decode())), tuple(model.encode(q.answer.decode())))
            for q in prepare.asked(context.questions)
        ]
        cache = model.new_cache(exact.shape[2] + SIDE_BY_SIDE_TOKENS)
        cache.length = exact.shape[2]

        def judged(kv: Any, cache: KVCache = cache, questions: list[Question] = questions) -> Any:
            cache.view().copy_(kv)
            return score(model, cache, questions, passage)

        wanted = judged(exact)
        for name, codec in codecs.items():
            manifest, data = encoded(codec, exact, ladders[name], model)
            n = len(manifest.chunks)
            costs = Costs(((0.004,) * len(manifest.levels),) * n, (0.08,) * n, 0.03)
            for policy, levels, distortion in sessions(manifest, costs, most):
                got = judged(arrived(codec, exact, manifest, data, levels))
                rows.append({
                    "context": context.name, "codec": name, "policy": policy, "levels": list(levels),
                    "distortion": distortion, "measured_kl": mean_kl(wanted.log_probs, got.log_probs),
                    "right": sum(got.right), "asked": len(questions),
                })  # fmt: skip
            print(f"{context.name}, {name}: {len(rows)} sessions so far", file=sys.stderr, flush=True)
    return rows


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation by codec, and over all."""
    from scipy.stats import spearmanr

    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for group in (row["codec"], "all"):
            groups[group].append(row)
    found = {
        group: {
            "sessions": len(members),
            "spearman": float(
                spearmanr(*([row[of] for row in members] for of in ("distortion", "measured_kl"))).statistic
            ),
        }
        for group, members in sorted(groups.items())
    }
    return {"groups": found, "threshold": THRESHOLD, "ok": found["all"]["spearman"] >= THRESHOLD}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", default=["docs", "code", "prose", "tests"])
    parser.add_argument("--sessions", type=int, default=20, help="at most so many for each context and codec")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    rows = measure(args.contexts, args.sessions)
    result = judge(rows)
    for name, group in result["groups"].items():
        print(f"{name:12} {group['sessions']:4} sessions   Spearman {group['spearman']:.3f}")
    print(f"threshold {THRESHOLD} over all: {'met' if result['ok'] else 'MISSED'}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result | {"rows": rows} | machine.describe(), indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
