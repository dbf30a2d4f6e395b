"""Adaptation policies against CacheGen's Algorithm 1 and the oracle, on traces that none of ours was tuned on.

    python benchmarks/adaptation.py [--split unseen|held-out|tune ...] [--policy NAME[,SETTING=VALUE...] ...]
                                    [--json FILE]

In the simulator, without a model: four contexts x all traces of the split x three start offsets x three deadlines,
round trips 0 and 40 ms. `unseen` are families of traces that no setting of ours was chosen on, `held-out` other traces
of the families that they were chosen on (`tune`). Every policy runs on every unit, at depth 2. Printed per policy:
units that miss the deadline, mean distortion, regret to the oracle where the policy met, where the baseline met as well
the regret as a part of its, and the paired differences to the baseline, with intervals from a bootstrap over traces;
for the default policy also by family and by context.

The baseline is Algorithm 1 at depth 1, as in the paper: it chooses when a chunk has arrived. Its rule plans up to the
deadline without the prefill that follows; `cachegen-aware` is told to keep the prefill's time free, which the
paper does not.

The contexts: `docs` is the shipped one under our codec, with sizes, distortions and compute times as measured with the
bundled model; `fast-text` is the same with recomputing at half the time, `no-text` without a model to recompute with;
`long-chunks` is synthetic, seven chunks of 1,500 tokens on a ladder of five levels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from testbed import plugs, shipped
from testbed.bounds import line_of, oracle_plan
from testbed.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from testbed.session import Costs, SessionFailed
from testbed.simulator import simulate
from testbed.stats import Mean, clustered_mean, mcnemar, paired_difference, verdict
from traces import library
from traces.framing import goodput_per_capacity
from traces.trace import Trace

MANIFEST_BYTES = 2_000
DRAWS = 2_000
BASELINE, LOOKS_AHEAD, AWARE, DEFAULT = "cachegen-depth1", "cachegen", "cachegen-aware", "kvstream"
DEPTHS = {BASELINE: 1}
"""Every other policy has depth 2."""
POLICIES = (
    *(
        BASELINE,
        AWARE,
        "cachegen",
        "artifact",
        "throughput",
        "buffer-based",
        "bola",
        "mpc",
        "robust-mpc",
        "chance",
        "cake",
        "hicache",
    ),
    *("kvstream", "lowest", "highest", "text", "random", "artifact-oracle", "oracle"),
)


@dataclass(frozen=True)
class Unit:
    """What every policy is run on."""

    family: str
    trace: str
    offset_s: float
    deadline_s: float
    context: str
    rtt_s: float


@cache
def contexts() -> dict[str, tuple[Manifest, Costs]]:
    offer = shipped.load("docs", "kvstream")
    if offer is None:
        raise SystemExit("the shipped context 'docs' is missing; reinstall kvstream")
    manifest, costs = offer.manifest, offer.costs
    assert costs.recompute_s is not None
    return {
        "docs": (manifest, costs),
        "fast-text": (manifest, replace(costs, recompute_s=tuple(s / 2 for s in costs.recompute_s))),
        "no-text": (manifest, replace(costs, recompute_s=None)),
        "long-chunks": _long_chunks(),
    }


def _long_chunks() -> tuple[Manifest, Costs]:
    sizes, ladder = (330e3, 440e3, 560e3, 700e3, 900e3), (0.02, 0.009, 0.004, 0.0018, 0.0008)
    chunks = []
    for index in range(7):
        start, stop = 1500 * index, min(1500 * (index + 1), 9490)
        share = (1 + 0.04 * ((7 * index) % 5 - 2)) * (stop - start) / 1500
        chunks.append(ChunkInfo(start, stop, tuple(int(size * share) for size in sizes), 6000))
    levels = tuple(LevelInfo(str(i), nats, 1.0 + i) for i, nats in enumerate(ladder))
    shape = KVShape(8, 4, 32, "bfloat16")
    manifest = Manifest("long-chunks", "none", {"codec": "raw"}, None, shape, levels, tuple(chunks))
    return manifest, Costs(((0.006, 0.0065, 0.007, 0.0075, 0.008),) * 7, tuple(0.12 + 0.01 * i for i in range(7)), 0.03)


def units(split: library.Split) -> Iterator[Unit]:
    grid = list(itertools.product((0.0, 3.3, 7.7), (0.7, 1.0, 1.5), contexts()))
    for family in library.families(split):
        for name in library.family_names(family, split):
            for i, (offset_s, deadline_s, context) in enumerate(grid):
                yield Unit(family, name, offset_s, deadline_s, context, (0.0, 0.04)[(i + i // 3 + i // 9) % 2])


@cache
def goodput(name: str, offset_s: float) -> Trace:
    trace = library.load(name)
    return (trace.shifted(offset_s) if offset_s else trace).scaled(goodput_per_capacity())


def bound(unit: Unit) -> float | None:
    """The oracle's distortion at depth 2, at which no plan is worse than at depth 1; None if no plan meets the
    deadline."""
    manifest, costs = contexts()[unit.context]
    link: dict[str, Any] = {"depth": 2, "rtt_s": unit.rtt_s, "manifest_bytes": MANIFEST_BYTES}
    plan = oracle_plan(line_of(manifest, goodput(unit.trace, unit.offset_s), costs=costs, **link), unit.deadline_s)
    return None if plan is None else plan.distortion


def session(job: tuple[Unit, str]) -> tuple[bool, float | None]:
    """Whether the deadline was met, and the distortion (None for a session that never ends)."""
    unit, policy = job
    manifest, costs = contexts()[unit.context]
    spec = f"cachegen,reserve_s={costs.prefill_s}" if policy == AWARE else policy.removesuffix("-depth1")
    try:
        record = simulate(
            manifest,
            plugs.make_policy(spec),
            goodput(unit.trace, unit.offset_s),
            deadline_s=unit.deadline_s,
            costs=costs,
            depth=DEPTHS.get(policy, 2),
            rtt_s=unit.rtt_s,
            manifest_bytes=MANIFEST_BYTES,
            seed=1,
        )
    except SessionFailed:
        return False, None
    if record.policy_faults:
        raise SystemExit(f"{policy}: {next(chunk.fault for chunk in record.chunks if chunk.fault)}")
    return record.met, record.distortion


@dataclass(frozen=True)
class Row:
    """One policy over a set of units, against the baseline."""

    policy: str
    group: str
    n: int
    missed: float
    infeasible: float
    distortion: float
    regret: Mean
    missed_more: Mean
    distortion_more: Mean
    both_met: int
    regret_both: float | None
    baseline_regret_both: float | None
    regret_ratio: tuple[float, float, float] | None
    """Regret where both met as a part of the baseline's, with its interval from a bootstrap over traces."""
    p: float


Outcomes = dict[str, list[tuple[bool, float | None]]]


def row(
    policy: str, group: str, among: Sequence[int], every: Sequence[Unit], ran: Outcomes, best: list[Any],
    baseline: str = BASELINE,
) -> Row:  # fmt: skip
    """Statistics of `policy` over the units `among`."""
    traces = [every[i].trace for i in among]
    ours, base = [ran[policy][i] for i in among], [ran[baseline][i] for i in among]
    known = [k for k in range(len(among)) if ours[k][1] is not None and base[k][1] is not None]
    met = [k for k in known if ours[k][0] and best[among[k]] is not None]
    both = [k for k in met if base[k][0]]

    def regret(of: list[tuple[bool, float | None]], over: list[int]) -> Mean:
        return clustered_mean([_number(of[k][1]) - best[among[k]] for k in over], [traces[k] for k in over])

    return Row(
        policy=policy,
        group=group,
        n=len(among),
        missed=sum(not o[0] for o in ours) / len(among),
        infeasible=sum(best[i] is None for i in among) / len(among),
        distortion=sum(_number(ours[k][1]) for k in known) / len(known),
        regret=regret(ours, met),
        missed_more=paired_difference([float(not o[0]) for o in ours], [float(not b[0]) for b in base], traces),
        distortion_more=paired_difference(
            [_number(ours[k][1]) for k in known], [_number(base[k][1]) for k in known], [traces[k] for k in known]
        ),
        both_met=len(both),
        regret_both=regret(ours, both).value,
        baseline_regret_both=regret(base, both).value,
        regret_ratio=ratio(
            [_number(ours[k][1]) - best[among[k]] for k in both],
            [_number(base[k][1]) - best[among[k]] for k in both],
            [traces[k] for k in both],
        ),
        p=mcnemar(
            gained=sum(o[0] and not b[0] for o, b in zip(ours, base, strict=True)),
            lost=sum(b[0] and not o[0] for o, b in zip(ours, base, strict=True)),
        ),
    )


def ratio(ours: Sequence[float], base: Sequence[float], traces: Sequence[str]) -> tuple[float, float, float] | None:
    """Sum of `ours` over that of `base`, and its 95 % interval by a bootstrap over traces; None without a base."""
    names = sorted(set(traces))
    sums = np.zeros((len(names), 2))
    for mine, theirs, trace in zip(ours, base, traces, strict=True):
        sums[names.index(trace)] += mine, theirs
    if not len(names) or sums[:, 1].sum() <= 0.0:
        return None
    drawn = sums[np.random.default_rng(1).integers(0, len(names), (DRAWS, len(names)))].sum(axis=1)
    drawn = drawn[drawn[:, 1] > 0.0]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    mine, theirs = sums.sum(axis=0)
    return float(mine / theirs), float(low), float(high)


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _interval(mean: Mean, digits: int) -> str:
    if mean.value is None:
        return "-"
    if mean.low is None:
        return f"{mean.value:+.{digits}f}"
    return f"{mean.value:+.{digits}f} [{mean.low:+.{digits}f}, {mean.high:+.{digits}f}]"


def _part(r: Row) -> str:
    """Regret as a part of the baseline's."""
    return "-" if r.regret_ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*r.regret_ratio)


def _print(rows: Iterable[Row], what: Callable[[Row], str]) -> None:
    print(
        f"{'':16} {'n':>5} {'missed':>7} {'distort.':>9} {'regret':>9}  {'part of its':18} "
        f"missed, minus {BASELINE:14} distortion, minus"
    )
    for r in rows:
        regret = "-" if r.regret.value is None else f"{r.regret.value:.5f}"
        more = f"{_interval(r.missed_more, 3):28} {_interval(r.distortion_more, 5)}"
        print(f"{what(r):16} {r.n:5} {r.missed:7.1%} {r.distortion:9.5f} {regret:>9}  {_part(r):18} {more}")


def report(split: library.Split, names: Sequence[str]) -> list[Row]:
    """Run every policy on a split, print the tables, and give their rows."""
    every = list(units(split))
    begun = time.perf_counter()
    with ProcessPoolExecutor() as pool:
        best = list(pool.map(bound, every, chunksize=64))
        ran = {name: list(pool.map(session, [(unit, name) for unit in every], chunksize=64)) for name in names}
    print(f"\n{split}: {len(every)} units, simulated in {time.perf_counter() - begun:.0f} s")
    rows = [row(name, "all", range(len(every)), every, ran, best) for name in names]
    print(f"no plan meets the deadline in {rows[0].infeasible:.1%} of the units\n")
    _print(rows, lambda r: r.policy)
    if DEFAULT not in names:
        return rows
    groups = [(unit.family, i) for i, unit in enumerate(every)] + [(u.context, i) for i, u in enumerate(every)]
    members: dict[str, list[int]] = {}
    for group, i in groups:
        members.setdefault(group, []).append(i)
    parts = [row(DEFAULT, group, among, every, ran, best) for group, among in members.items()]
    print(f"\n{DEFAULT} by family and by context")
    _print(parts, lambda r: r.group)
    whole = next(r for r in rows if r.policy == DEFAULT)
    print(f"\nregret where both met: {_part(whole)} of that of {BASELINE} ({whole.both_met} units)")
    if LOOKS_AHEAD in names:
        ahead = row(DEFAULT, "all", range(len(every)), every, ran, best, LOOKS_AHEAD)
        print(f"at depth 2: {_part(ahead)} of that of {LOOKS_AHEAD} ({ahead.both_met} units)")
    met = [[bool(outcome[0]) for outcome in ran[name]] for name in (DEFAULT, BASELINE)]
    print(verdict(DEFAULT, BASELINE, met[0], met[1], whole.distortion_more))
    return rows + parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", nargs="+", choices=get_args(library.Split), default=["unseen", "held-out"])
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), help="with settings, if any; the baseline too")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    names = list(dict.fromkeys((BASELINE, *args.policy)))
    found = {split: [asdict(one) for one in report(split, names)] for split in args.split}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"baseline": BASELINE, "splits": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
