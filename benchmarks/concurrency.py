"""Requests that share one link and one decoder: in batches by chunk index (CacheGen, section 5.3), or independently.

    python benchmarks/concurrency.py [--simulate] [--requests N ...] [--out FILE.json]

R requests for contexts of 1,500 to 4,500 tokens of Mistral-7B on an A40 (synthetic: real bytes, compute by profile)
arrive within 50 ms and share a link that replays a trace. The same requests run in the simulator, and, without
--simulate, over an emulated link with a connection for each. Printed for each way: TTFT, when all were done, SLO
violations, distortion, and the deviation of the emulated link. A run over the fidelity limits is repeated. The first
run draws and encodes the caches and keeps them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.testbed.config import build  # noqa: E402
from kvstream.testbed.host import machine  # noqa: E402
from kvstream.testbed.simulator.concurrent import Request, Served, simulate_batched, simulate_shared, totals  # noqa: E402
from kvstream.testbed.store.manifest import Manifest  # noqa: E402
from kvstream.testbed.workloads import synthetic  # noqa: E402
from kvstream.traces.framing import goodput_per_capacity  # noqa: E402
from kvstream.traces.resolve import open_trace  # noqa: E402

WORKLOAD, CODEC, CHUNK_TOKENS = "mistral-7b,compute=a40", "cachegen", 1500
CONTEXTS = ("1500", "3000", "4500")
TRACES = ("constant,rate=1Gbps", "uniform,low=300Mbps,high=2Gbps,hold=0.2s,seed=5")
WAYS = (("batched", "cachegen"), ("shared", "cachegen"), ("batched", "lowest"), ("shared", "lowest"))
WINDOW_S, MOST, DEADLINE_S, SPREAD_S = 0.05, 8, 1.5, 0.05
RTT_S = 0.0
"""A link without delay."""
REPEATS = 3
LEAD_S = 0.15
"""From the command to the link's time zero: connections are made and padded in it."""


def asked(count: int, policy: str) -> list[dict[str, Any]]:
    """R requests as the receiver takes them."""
    return [
        {"context": CONTEXTS[i % len(CONTEXTS)], "policy": policy, "deadline_s": DEADLINE_S,
         "arrival_s": SPREAD_S * i / count, "seed": i}
        for i in range(count)
    ]  # fmt: skip


def simulated(count: int, way: tuple[str, str], trace: str, manifests: dict[str, Manifest]) -> list[Served]:
    workload = synthetic.parse(WORKLOAD)
    requests = [
        Request(manifests[one["context"]], build.make_policy(one["policy"]), workload.costs(manifests[one["context"]]),
                one["deadline_s"], one["arrival_s"], one["seed"])
        for one in asked(count, way[1])
    ]  # fmt: skip
    goodput = open_trace(trace).scaled(goodput_per_capacity())
    if way[0] == "batched":
        return simulate_batched(requests, goodput, window_s=WINDOW_S, max_batch=MOST, rtt_s=RTT_S)
    return simulate_shared(requests, goodput, rtt_s=RTT_S)


def emulated(stage: Any, count: int, way: tuple[str, str], trace: str, ids: dict[str, str]) -> dict[str, Any]:
    """The receiver's answer, with what the link did."""
    from kvstream.testbed.run import stage as staged

    link = open_trace(trace)
    zero_s = time.monotonic() + LEAD_S + 0.1 * count
    stage.path.arm(link, zero_s, staged.COVERED_S)
    requests = [one | {"context": ids[one["context"]]} for one in asked(count, way[1])]
    answer: dict[str, Any] = stage.receiver.ask(
        {
            "cmd": "group", "url": f"http://{stage.path.network.sender_ip}:{staged.PORT}", "start_s": zero_s,
            "requests": requests, "batched": way[0] == "batched", "window_s": WINDOW_S, "max_batch": MOST,
            "rtt_s": RTT_S, "padding_bytes": staged.PADDING_BYTES,
        },
        staged.SESSION_LIMIT_S,
    )  # fmt: skip
    verdict = stage.path.finish().judge(link)
    return answer | {"fidelity": verdict.to_json()}


def row(count: int, way: tuple[str, str], trace: str, where: str, found: dict[str, float]) -> dict[str, Any]:
    return {"requests": count, "way": way[0], "policy": way[1], "trace": trace, "where": where} | found


def measure(counts: Sequence[int], emulate: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    workload = synthetic.parse(WORKLOAD)
    units = [(count, way, trace) for trace in TRACES for count in counts for way in WAYS]
    if not emulate:
        manifests = {context: workload.manifest(context, CODEC, CHUNK_TOKENS) for context in CONTEXTS}
        for count, way, trace in units:
            rows.append(row(count, way, trace, "simulator", totals(simulated(count, way, trace, manifests))))
        return rows
    from kvstream.testbed.encoding import synthetic_store
    from kvstream.testbed.run.stage import open_stage

    prepared = synthetic_store.prepare(
        WORKLOAD, CONTEXTS, [CODEC], CHUNK_TOKENS, lambda line: print(line, file=sys.stderr)
    )
    manifests = {context: prepared.manifests[context, CODEC] for context in CONTEXTS}
    ids = {context: prepared.ids[context, CODEC] for context in CONTEXTS}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_stage(build.make_link(""), [open_trace(trace) for trace in TRACES], prepared, Path(folder)) as stage,
    ):
        for count, way, trace in units:
            expected = simulated(count, way, trace, manifests)
            rows.append(row(count, way, trace, "simulator", totals(expected)))
            for _ in range(REPEATS):
                answer = emulated(stage, count, way, trace, ids)
                if answer["status"] != "ok" or answer["fidelity"]["ok"]:
                    break
            if answer["status"] != "ok":
                raise SystemExit(f"{count} requests, {way}: {answer['error']}")
            each = [one["record"]["ttft_s"] for one in answer["served"]]
            late = [a - b.record.ttft_s for a, b in zip(each, expected, strict=True)]
            rows.append(
                row(count, way, trace, "emulated", totals([_served(one) for one in answer["served"]]))
                | {"ttft_s": each, "later_than_simulated_s": late, "fidelity": answer["fidelity"]}
            )
            print(line_of(rows[-2]), line_of(rows[-1]), sep="\n", file=sys.stderr, flush=True)
    return rows


def _served(body: dict[str, Any]) -> Served:
    """As the worker sent it; of the record what `totals` needs."""
    from kvstream.testbed.session.record import SessionRecord

    record = body["record"] | {"levels": tuple(body["record"]["levels"]), "chunks": ()}
    return Served(SessionRecord(**record), body["arrival_s"], body["batch"])


def line_of(found: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{found['trace'][:34]:34} {found['requests']:3} {found['way']:8} {found['policy']:9} {found['where']:9}"
    note = ""
    if found["where"] == "emulated":
        worst = max(found["later_than_simulated_s"], key=abs)
        note = f"  simulator {worst * 1e3:+.0f} ms at worst" + ("" if found["fidelity"]["ok"] else "  INVALID link")
    return (
        f"{head} TTFT {found['ttft_mean_s']:6.3f} s p95 {found['ttft_p95_s']:6.3f} s  "
        f"all {found['all_done_s']:6.3f} s  missed {found['violations']:4.0%}  {found['distortion']:.3f} nats{note}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="only in the simulator")
    parser.add_argument("--requests", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    if not options.simulate:
        from kvstream.testbed.emulator import sandbox

        if not sandbox.inside():
            return sandbox.run([sys.executable, *sys.argv])
    rows = measure(options.requests, not options.simulate)
    print("\n".join(line_of(found) for found in rows))
    if options.out:
        settings = {
            "workload": WORKLOAD,
            "codec": CODEC,
            "window_s": WINDOW_S,
            "max_batch": MOST,
            "deadline_s": DEADLINE_S,
        }
        body = {"settings": settings, "synthetic": True, "rows": rows} | machine.describe()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
