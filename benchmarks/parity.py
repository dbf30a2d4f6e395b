"""Does the simulator agree with the emulated link? Chunk finish times of the same decisions, side by side.

    python benchmarks/parity.py [--small] [--out FILE.json]

60 units take about 10 minutes. With --out every unit is kept as soon as it is measured, and a call on the same file
goes on where the last one stopped; units that were invalid are measured again.

Each unit is a trace, a round trip and a depth. Levels are drawn at random (text among them) in a session over a real
emulated link; the simulator then replays these levels over the same trace with the compute times measured before. What
is compared is when the last byte of every chunk arrived. Units whose queue dropped packets are reported apart: a fluid
link has no losses. A session over the fidelity limits (a machine that was busy with something else) is repeated.

The bars, over all chunks of the units without drops: the difference is within max(5 ms, 3 %) of the finish time at the
median and within max(5 ms, 8 %) at the 95th percentile. The queue is long (2 MB), so that drops are rare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from policies.api import TEXT, Choice, Observation  # noqa: E402

CONTEXT, CODEC, CHUNK_TOKENS = "docs", "uniform", 256
TRACES = (
    "constant,rate=8Mbps",
    "constant,rate=40Mbps",
    "constant,rate=200Mbps",
    "step-down-up,scale_mean=40Mbps",
    "uniform,low=5Mbps,high=75Mbps,hold=0.2s,seed=7",
    "wifi,scale_mean=50Mbps",
    "lte-walk,scale_mean=30Mbps",
    "lab-sawtooth,scale_mean=40Mbps",
    "lab-outage,scale_mean=30Mbps",
    "family/markov-003,scale_mean=40Mbps",
)
DELAYS = ("0ms", "10ms", "40ms")
"""One way: round trips of 0, 20 and 80 ms."""
DEPTHS = (1, 2)
QUEUE = "queue_bytes=2000000"
SMALL = (
    ("0ms", "constant,rate=40Mbps", 2),
    ("0ms", "uniform,low=5Mbps,high=75Mbps,per=chunk,seed=7", 1),
    ("10ms", "uniform,low=5Mbps,high=75Mbps,hold=0.2s,seed=7", 2),
    ("10ms", "wifi,scale_mean=50Mbps", 1),
    ("10ms", "uniform,low=5Mbps,high=75Mbps,per=chunk,seed=7", 2),
    ("40ms", "constant,rate=40Mbps", 1),
)
FLOOR_S, MEDIAN, P95 = 0.005, 0.03, 0.08
MOST_REPEATS = 6


@dataclass
class Drawn:
    """A level at random for each chunk, text among them: sizes that vary, whatever the link does."""

    seed: int = 0

    def choose(self, obs: Observation) -> Choice:
        levels = [*range(obs.n_levels), *range(obs.n_levels), TEXT]
        return Choice(random.Random(f"{self.seed}/{obs.chunk}").choice(levels))  # type: ignore[arg-type]


@dataclass
class Plan:
    """Levels that are known beforehand."""

    levels: tuple[Any, ...]

    def choose(self, obs: Observation) -> Choice:
        return Choice(self.levels[obs.chunk])


def units(small: bool) -> list[tuple[str, str, int]]:
    """(delay one way, trace, depth), by delay, since each delay needs a network of its own."""
    return list(SMALL) if small else list(itertools.product(DELAYS, TRACES, DEPTHS))


def key_of(unit: dict[str, Any]) -> tuple[float, str, int]:
    return unit["rtt_ms"], unit["trace"], unit["depth"]


def measure(
    small: bool, folder: Path, known: list[dict[str, Any]], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Every unit that is not `known`, over its emulated link and in the simulator, and the known ones before them.

    `keep` is called with all there is after each unit. Runs inside a sandbox.
    """
    from testbed import plugs, prepare
    from testbed.emulator import fidelity
    from testbed.experiment import Scheme, Unit
    from testbed.runner import Stage
    from testbed.simulator import simulate
    from traces.framing import goodput_per_capacity
    from traces.resolve import open_trace
    from traces.units import parse_time

    done = {key_of(unit) for unit in known}
    numbered = [
        (index, unit)
        for index, unit in enumerate(units(small))
        if (2000.0 * parse_time(unit[0]), *unit[1:]) not in done
    ]
    results = list(known)
    if not numbered:
        return results
    prepared = prepare.prepare("bundled", [CONTEXT], [CODEC], CHUNK_TOKENS, lambda line: print(line, file=sys.stderr))
    manifest = prepared.manifests[CONTEXT, CODEC]
    for delay, part in itertools.groupby(numbered, key=lambda pair: pair[1][0]):
        chosen = list(part)
        link_text = f"delay={delay},{QUEUE}"
        link = plugs.make_link(link_text)
        traces = {trace: open_trace(trace) for _, (_, trace, _) in chosen}
        with Stage(link, list(traces.values()), prepared, folder) as stage:
            costs = stage.costs[CONTEXT, CODEC]
            for index, (_, name, depth) in chosen:
                unit = Unit(index, CONTEXT, name, 0.0, 5.0, link_text, seed=index)
                scheme = Scheme(f"{Path(__file__).resolve()}:Drawn,seed={index}", CODEC, depth=depth, label="drawn")
                result, chunks, _ = stage.settled(unit, scheme, traces[name], fidelity.Limits(), None, MOST_REPEATS)
                found = {
                    "trace": name,
                    "rtt_ms": 2000.0 * link.delay_s,
                    "depth": depth,
                    "status": result.status,
                    "why": result.why,
                    "repeats": result.repeats,
                    "drops": result.fidelity.get("drops", 0),
                }
                if result.status == "ok":
                    simulated = simulate(
                        manifest,
                        Plan(tuple(chunk["level"] for chunk in chunks)),
                        traces[name].scaled(goodput_per_capacity(link.mtu)),
                        deadline_s=unit.deadline_s,
                        costs=costs,
                        depth=depth,
                        rtt_s=2.0 * link.delay_s,
                    )
                    assert result.record is not None
                    found |= {
                        "emulated_s": [chunk["last_byte_s"] for chunk in chunks],
                        "simulated_s": [chunk.last_byte_s for chunk in simulated.chunks],
                        "ttft_emulated_s": result.record["ttft_s"],
                        "ttft_simulated_s": simulated.ttft_s,
                        "levels": [chunk["level"] for chunk in chunks],
                    }
                results.append(found)
                keep(results)
                print(line_of(found), file=sys.stderr, flush=True)
    return results


def deviations(unit: dict[str, Any]) -> list[tuple[float, float]]:
    """(difference in seconds, finish time in the simulator) of every chunk."""
    return [(abs(e - s), s) for e, s in zip(unit["emulated_s"], unit["simulated_s"], strict=True)]


def judge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The table's last lines: the bars over all chunks of the units that count."""
    import numpy as np

    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for unit in found:
        if unit["status"] == "ok":
            groups["without drops" if unit["drops"] == 0 else "with drops"] += deviations(unit)
    summary: dict[str, Any] = {
        "units": len(found),
        "invalid": sum(unit["status"] != "ok" for unit in found),
        "with_drops": sum(unit["status"] == "ok" and unit["drops"] > 0 for unit in found),
    }
    for name, pairs in groups.items():
        difference_s, finish_s = np.array(pairs).T
        summary[name] = {
            "chunks": len(pairs),
            "median_s": float(np.median(difference_s)),
            "p95_s": float(np.percentile(difference_s, 95)),
            "median_relative": float(np.median(difference_s / finish_s)),
            "p95_relative": float(np.percentile(difference_s / finish_s, 95)),
            "median_of_bar": float(np.median(difference_s / np.maximum(FLOOR_S, MEDIAN * finish_s))),
            "p95_of_bar": float(np.percentile(difference_s / np.maximum(FLOOR_S, P95 * finish_s), 95)),
        }
    counted = summary.get("without drops")
    summary["ok"] = counted is not None and counted["median_of_bar"] <= 1.0 and counted["p95_of_bar"] <= 1.0
    return summary


def line_of(unit: dict[str, Any]) -> str:
    """A unit's row of the table."""
    import numpy as np

    head = f"{unit['trace'][:44]:<44} {unit['rtt_ms']:>4.0f} ms  depth {unit['depth']}  "
    if unit["status"] != "ok":
        return f"{head}{unit['status']}: {unit['why']}"
    difference_s = [pair[0] for pair in deviations(unit)]
    last = unit["emulated_s"][-1] - unit["simulated_s"][-1]
    drops = f"  {unit['drops']} drops" if unit["drops"] else ""
    repeats = f"  {unit['repeats']} repeats" if unit["repeats"] else ""
    return (
        f"{head}median {np.median(difference_s) * 1e3:>6.1f} ms  max {max(difference_s) * 1e3:>6.1f} ms  "
        f"end {unit['simulated_s'][-1]:6.3f} s {last * 1e3:>+7.1f} ms{drops}{repeats}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="6 units")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    from testbed.emulator import sandbox

    if not sandbox.inside():
        return sandbox.run([sys.executable, *sys.argv])
    from testbed import machine
    from testbed.results import write_whole

    facts = machine.describe()

    def keep(found: list[dict[str, Any]]) -> None:
        if options.out:
            body = {"summary": judge(found), "bars": [FLOOR_S, MEDIAN, P95], "units": found}
            write_whole(options.out, body | facts)

    known = json.loads(options.out.read_text())["units"] if options.out and options.out.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.small, Path(folder), [unit for unit in known if unit["status"] == "ok"], keep)
    keep(found)
    summary = judge(found)
    print(json.dumps(summary, indent=1))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    sys.exit(main())
