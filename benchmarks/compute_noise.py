"""How far compute in real sessions lies from its estimates, as `kvstream.testbed.session.costs.IN_SESSIONS` says.

    python benchmarks/compute_noise.py runs/main [--json FILE.json]

RUN is the folder of an emulated run. For every step of its sessions, log(actual / estimated) is split into what all
steps of a session have in common and what is each step's own, by a one-way analysis of variance with random effects
(the estimates are medians, so the median is taken off first). Of a prefill a session has one, so the prefills' own part
is what the sessions' common part, as decoding shows it, leaves of their variance.

Printed beside them: quantiles of actual / estimated, measured and as `kvstream.testbed.simulator.noise` draws them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.testbed.host import machine  # noqa: E402
from kvstream.testbed.results.folder import Run  # noqa: E402
from kvstream.testbed.session.costs import IN_SESSIONS, Spread  # noqa: E402
from kvstream.testbed.simulator import noise  # noqa: E402

KINDS = ("decode", "recompute", "prefill")
QUANTILES = (0.05, 0.5, 0.95, 0.99)
DRAWS = 20_000


def steps_of(cell: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, list[float]]:
    """[kind]: log(actual / estimated) of the steps of a session."""
    row, found = cell["row"], {kind: [] for kind in KINDS}
    ends = []
    for chunk in cell["chunks"]:
        if chunk["decode_end_s"] is None:
            continue
        kind = "recompute" if chunk["level"] == "text" else "decode"
        at = chunk["chunk"]
        alone_s = costs["recompute_s"][at] if kind == "recompute" else costs["decode_s"][at][chunk["level"]]
        took_s = chunk["decode_end_s"] - chunk["decode_start_s"]
        found[kind].append(math.log(max(took_s, 1e-9) / (alone_s * row["slowdown"][kind])))
        ends.append(chunk["decode_end_s"])
    if ends:
        took_s = row["ttft_s"] - max(ends)
        found["prefill"].append(math.log(max(took_s, 1e-9) / (costs["prefill_s"] * row["slowdown"]["prefill"])))
    return found


def spread(sessions: Sequence[Sequence[float]]) -> Spread:
    """Of sessions with several steps each: analysis of variance with random effects."""
    several = [steps for steps in sessions if len(steps) > 1]
    if len(several) < 2:
        return Spread()
    n = sum(map(len, several))
    within = sum(statistics.variance(steps) * (len(steps) - 1) for steps in several) / (n - len(several))
    usual = n / len(several)
    between = statistics.variance([statistics.fmean(steps) for steps in several]) - within / usual
    return Spread(math.sqrt(max(between, 0.0)), math.sqrt(within))


def quantiles(logs: Sequence[float]) -> list[float]:
    return [round(math.exp(float(value)), 2) for value in np.quantile(np.asarray(logs), QUANTILES)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    run = Run(args.run)
    by_context = {key.rpartition("-")[0]: costs for key, costs in run.manifest["costs"].items()}
    sessions = [
        steps_of(cell, by_context[f"{cell['row']['context']}-{cell['row']['codec']}"])
        for cell in run.load_cells()
        if cell["row"]["status"] == "ok"
    ]
    logs = {kind: [step for session in sessions for step in session[kind]] for kind in KINDS}
    found = {kind: spread([session[kind] for session in sessions]) for kind in ("decode", "recompute")}
    prefill = statistics.variance(logs["prefill"])
    shared = min(found["decode"].shared, math.sqrt(prefill))
    found["prefill"] = Spread(shared, math.sqrt(max(prefill - shared**2, 0.0)))
    factors = noise.draw(np.arange(DRAWS), 1)
    drawn = {kind: np.log(getattr(factors, kind)).ravel() for kind in KINDS}
    rows = []
    for kind in KINDS:
        if not logs[kind]:
            continue
        used: Spread = getattr(IN_SESSIONS, kind)
        rows.append(
            {
                "step": kind,
                "n": len(logs[kind]),
                "shared": round(found[kind].shared, 3),
                "own": round(found[kind].own, 3),
                "shared_used": used.shared,
                "own_used": used.own,
                "measured": quantiles(logs[kind]),
                "drawn": quantiles(drawn[kind].tolist()),
            }
        )
    print(f"{len(sessions)} sessions of {args.run.name}; quantiles {QUANTILES} of actual / estimated")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "quantiles": QUANTILES} | machine.describe(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
