"""Does the simulator agree with the emulated link? When chunks arrive, when the next ones are chosen, and on what.

    python benchmarks/parity.py [--small] [--out FILE.json]

60 units take about 10 minutes. With --out every unit is kept as soon as it is measured, and a call on the same file
resumes where the last one stopped; units that were invalid are measured again.

Each unit is a trace, a round trip and a depth. Levels are drawn at random (text among them) in a session over a real
emulated link; the simulator then replays these levels over the same trace with the compute times measured before. Three
things are compared for every chunk: when its last byte arrived; when it was chosen, counted from the first byte of the
chunk before it, so that a difference counts once; and the estimate of the link that a policy had then (all that was
measured, bits over time). Units whose queue dropped packets are reported apart: a fluid link has no losses. A session
over the fidelity limits (a machine that was busy with something else) is repeated.

The thresholds, over all chunks of the units without drops: finish times differ by at most max(5 ms, 3 %) at the median
and max(5 ms, 8 %) at the 95th percentile; decision times by at most 10 ms at the 95th percentile. No choice after the
first encoded chunk is made without an estimate, or on more than 1.2 times the highest rate that the link has had. The
queue is long (2 MB), so that drops are rare.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.policies import estimators  # noqa: E402
from kvstream.policies.api import TEXT, Choice, Observation  # noqa: E402

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
DECISION_P95_S = 0.01
PHANTOM = 1.2
"""An estimate above this many times the link's highest rate so far is of a rate that the link never had."""
MAX_REPEATS = 6


@dataclass
class Drawn:
    """A level at random for each chunk, text among them: sizes that vary, whatever the link does."""

    seed: int = 0

    def choose(self, obs: Observation) -> Choice:
        levels = [*range(obs.n_levels), *range(obs.n_levels), TEXT]
        level = random.Random(f"{self.seed}/{obs.chunk}").choice(levels)
        return Choice(level, reason=estimates(obs))  # type: ignore[arg-type]


@dataclass
class Plan:
    """Levels that are known beforehand."""

    levels: tuple[Any, ...]

    def choose(self, obs: Observation) -> Choice:
        return Choice(self.levels[obs.chunk], reason=estimates(obs))


def estimates(obs: Observation) -> dict[str, float]:
    """What a policy can know of the link: bits over time of all that was measured, and the goodput of the last chunk.
    Empty while there is nothing."""
    samples, last = estimators.link_samples(obs), estimators.goodputs(obs)
    if not samples or not last:
        return {}
    bits, seconds = (sum(column) for column in zip(*samples, strict=True))
    return {"link_bps": bits / seconds, "last_bps": last[-1]}


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
    from kvstream.testbed.config import build
    from kvstream.testbed.config.experiment import Scheme, Unit
    from kvstream.testbed.emulator import fidelity
    from kvstream.testbed.encoding import prepare
    from kvstream.testbed.run.stage import open_stage
    from kvstream.testbed.session.settings import SessionSettings
    from kvstream.testbed.simulator.simulator import simulate
    from kvstream.traces.framing import goodput_per_capacity
    from kvstream.traces.resolve import open_trace
    from kvstream.traces.units import parse_time

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
        link = build.make_link(link_text)
        traces = {trace: open_trace(trace) for _, (_, trace, _) in chosen}
        with open_stage(link, list(traces.values()), prepared, folder) as stage:
            costs = stage.costs[CONTEXT, CODEC]
            for index, (_, name, depth) in chosen:
                unit = Unit(index, CONTEXT, name, 0.0, 5.0, link_text, seed=index)
                scheme = Scheme(f"{Path(__file__).resolve()}:Drawn,seed={index}", CODEC, depth=depth, label="drawn")
                measured = stage.settled(unit, scheme, traces[name], fidelity.Limits(), None, MAX_REPEATS)
                result, chunks = measured.outcome, measured.chunks
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
                        SessionSettings(unit.deadline_s, depth),
                        costs=costs,
                        rtt_s=2.0 * link.delay_s,
                    )
                    assert result.record is not None
                    found |= {
                        "emulated_s": [chunk["last_byte_s"] for chunk in chunks],
                        "simulated_s": [chunk.last_byte_s for chunk in simulated.chunks],
                        "emulated": [decision_of(chunk) for chunk in chunks],
                        "simulated": [decision_of(asdict(chunk)) for chunk in simulated.chunks],
                        "link_bps": [rate_until(traces[name], chunk["request_s"], chunk["chunk"]) for chunk in chunks],
                        "ttft_emulated_s": result.record["ttft_s"],
                        "ttft_simulated_s": simulated.ttft_s,
                        "levels": [chunk["level"] for chunk in chunks],
                    }
                results.append(found)
                keep(results)
                print(line_of(found), file=sys.stderr, flush=True)
    return results


def decision_of(chunk: dict[str, Any]) -> dict[str, float]:
    """When a chunk was chosen and on what, and when its first byte came."""
    return {"request_s": chunk["request_s"], "first_byte_s": chunk["first_byte_s"]} | chunk["reason"]


def rate_until(trace: Any, end_s: float, chunk: int) -> float:
    """The highest rate that a link has had by then, bits per second."""
    if trace.per == "chunk":
        return max(trace.chunk_rate(i) for i in range(chunk + 1))
    return max(rate for _, rate in trace.changes(0.0, end_s))


def decisions(unit: dict[str, Any]) -> list[float]:
    """Of every choice but the first: the difference of its times after the first byte of the chunk before, seconds."""
    after = [
        [now["request_s"] - before["first_byte_s"] for before, now in itertools.pairwise(unit[world])]
        for world in ("emulated", "simulated")
    ]
    return [abs(e - s) for e, s in zip(*after, strict=True)]


def unfounded(unit: dict[str, Any]) -> tuple[int, int, int]:
    """(choices after the first encoded chunk, those without an estimate, those on a rate that the link never had)."""
    first = next((i for i, level in enumerate(unit["levels"]) if level != TEXT), len(unit["levels"]))
    later = list(zip(unit["emulated"], unit["link_bps"], strict=True))[first + 1 :]
    blind = sum("link_bps" not in choice for choice, _ in later)
    phantom = sum(
        max(choice.get("link_bps", 0.0), choice.get("last_bps", 0.0)) > PHANTOM * top for choice, top in later
    )
    return len(later), blind, phantom


def ratios(unit: dict[str, Any]) -> list[float]:
    """Emulated over simulated estimate, where both have one."""
    pairs = zip(unit["emulated"], unit["simulated"], strict=True)
    return [e["link_bps"] / s["link_bps"] for e, s in pairs if "link_bps" in e and "link_bps" in s]


def deviations(unit: dict[str, Any]) -> list[tuple[float, float]]:
    """(difference in seconds, finish time in the simulator) of every chunk."""
    return [(abs(e - s), s) for e, s in zip(unit["emulated_s"], unit["simulated_s"], strict=True)]


def judge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The table's last lines: the thresholds over all chunks of the units that count."""
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
            "median_of_threshold": float(np.median(difference_s / np.maximum(FLOOR_S, MEDIAN * finish_s))),
            "p95_of_threshold": float(np.percentile(difference_s / np.maximum(FLOOR_S, P95 * finish_s), 95)),
        }
    calm = [unit for unit in found if unit["status"] == "ok" and unit["drops"] == 0]
    if not calm:
        return summary | {"ok": False}
    times_s = np.array([s for unit in calm for s in decisions(unit)])
    shares = np.array([share for unit in calm for share in ratios(unit)])
    choices, blind, phantom = np.sum([unfounded(unit) for unit in found if unit["status"] == "ok"], axis=0).tolist()
    summary |= {
        "decisions": {"choices": len(times_s)} | _quantiles(times_s, "s"),
        "estimates": {"p5": float(np.percentile(shares, 5)), "p50": float(np.median(shares))}
        | {"p95": float(np.percentile(shares, 95))},
        "unfounded": {"choices": choices, "blind": blind, "phantom": phantom},
    }
    counted = summary["without drops"]
    summary["ok"] = (
        max(counted["median_of_threshold"], counted["p95_of_threshold"]) <= 1.0
        and summary["decisions"]["p95_s"] <= DECISION_P95_S
        and blind == phantom == 0
    )
    return summary


def _quantiles(values: Any, unit: str) -> dict[str, float]:
    import numpy as np

    return {f"median_{unit}": float(np.median(values)), f"p95_{unit}": float(np.percentile(values, 95))}


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
    _, blind, phantom = unfounded(unit)
    wrong = f"  {blind} blind, {phantom} phantom" if blind or phantom else ""
    return (
        f"{head}median {np.median(difference_s) * 1e3:>6.1f} ms  max {max(difference_s) * 1e3:>6.1f} ms  "
        f"end {unit['simulated_s'][-1]:6.3f} s {last * 1e3:>+7.1f} ms  "
        f"decisions p95 {np.percentile(decisions(unit), 95) * 1e3:>5.1f} ms{wrong}{drops}{repeats}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="6 units")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    from kvstream.testbed.emulator import sandbox

    if not sandbox.inside():
        return sandbox.run([sys.executable, *sys.argv])
    from kvstream.testbed.host import machine
    from kvstream.testbed.results.folder import write_whole

    facts = machine.describe()

    def keep(found: list[dict[str, Any]]) -> None:
        if options.out:
            body = {"summary": judge(found), "thresholds": [FLOOR_S, MEDIAN, P95], "units": found}
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
