"""A warm receiver process: sessions on command, one JSON object per line on stdin, one answer per line on stdout.

    python -m kvstream.testbed.receiver --model PATH_OR_NAME --store DIR [--device cpu] [--pages-on DEVICE ...]
                                        [--codec ./mine.py:Zip ...]    classes from files, beside the codecs there are
    python -m kvstream.testbed.receiver --workload mistral-7b,compute=a40 --store DIR      no model: compute is timed

`--store` is the receiver's own copy of what sessions are judged by (questions, exact log-probabilities) and of the
chunks on which costs are measured before any session; sessions themselves take everything from the sender. When the
model is loaded, the process prints `{"ready": true, "model": "<fingerprint>", "threads": 1, ...}`, and then obeys:

    {"cmd": "prepare", "contexts": ["docs-raw-1"]}
        builds codecs, warms every code path, measures: {"ok": true, "costs": {"docs-raw-1": {"decode_s": [[...]],
        "recompute_s": [...], "prefill_s": 0.04}}}
    {"cmd": "warm_up", "contexts": ["docs-raw-1"], "url": "http://10.0.0.1:8700"}       optional: "others"
        holds sessions to learn what costs are in sessions (kvstream.testbed.receiver.warmup): {"ok": true, "slowdown":
        {"docs-raw-1": {"decode": 1.8, "recompute": 1.3, "prefill": 1.5}}, "round_trip_s": 0.012}
    {"cmd": "session", "url": "http://10.0.0.1:8700", "context": "docs-raw-1", "policy": "cachegen",
     "deadline_s": 1.0, ...}
        optional: "question": 0 (index of the timed one), "depth": 2, "overlap": true, "cold": false,
        "padding_bytes": 0, "start_s": null (CLOCK_MONOTONIC), "prior_bps": null, "concurrent": 1, "seed": 0,
        "steps": null (the shaper's socket, notified of each chunk's first byte),
        "others": ["http://10.1.1.1:8700", ...] (senders of the other chunks: see kvstream.testbed.net.multi_sender),
        "events": {"file": "/.../events.jsonl", "unit_id": "003", "scheme": "cachegen"} (the chunks' progress),
        "load": false (a background load on the device; its slowdown is reported),
        "evaluate": true, "limits": {"stall_s": 5, "reconnects": 3, "session_s": 120},
        "forecast": {"durations_s": [...], "rates_bps": [...], "end": "hold", "rtt_s": 0.04,
                     "initial_window_bytes": null}   (goodput from the session's start; for clairvoyant policies)
        {"ok": true, "status": "ok", "record": {...}, "token": 51, "zero_s": ..., "late_s": ..., "rtt_s": ...,
         "answer_ok": true, "answers_right": 7, "answers": 8, "measured_kl": 0.0021, ...,
         "slowdown": {"decode": 1.8, ...}}     (what the costs were corrected by)
        {"ok": true, "status": "failed", "error": "connection to the sender lost after 3 reconnections: ..."}
    {"cmd": "ready", ...}
        a session up to its time 0, with the same settings but for "start_s" and "evaluate"; optional:
        "padding_until_s": null (CLOCK_MONOTONIC at which padding ends), "judge": false (also judge the cache that the
        last session left): {"ok": true, "status": "ready", "judgement": {"answer_ok": true, "answers_right": 7, ...}}
    {"cmd": "start", "start_s": ...}
        the session that is ready, at CLOCK_MONOTONIC: answered as "session", without its judgement
    {"cmd": "judge"}
        the cache that the last session left: {"ok": true, "judgement": {"answer_ok": true, ...}}
    {"cmd": "quit"}

An invalid command is answered with `{"ok": false, "error": "..."}` and the process continues. It ends with its stdin.
If the sender needs a bearer token, it is taken from the environment variable KVSTREAM_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import traceback
from typing import IO

from kvstream.testbed.config.build import codec_spec
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.engine.threads import SWITCH_INTERVAL_S, set_threads
from kvstream.testbed.errors import SpecError
from kvstream.testbed.host.clock import Urgency, be_punctual, go_before_others
from kvstream.testbed.net.network_process import NetworkProcess
from kvstream.testbed.receiver.model_worker import ModelWorker
from kvstream.testbed.receiver.warmup import Experience
from kvstream.testbed.receiver.worker import REFUSALS, Worker
from kvstream.testbed.store.opening import open_store


async def obey_lines(worker: Worker, commands: IO[str], answers: IO[str]) -> None:
    """One answer per command, until `quit` or the end of input."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, commands.readline):
        try:
            command = json.loads(line)
            if command["cmd"] == "quit":
                return
            answer = await worker.obey(command)
        except REFUSALS as error:
            answer = {"ok": False, "error": str(error)}
        except (ValueError, KeyError, TypeError) as error:
            answer = {"ok": False, "error": f"malformed command: {error!r}"}
        except Exception as error:  # a bug of ours or of a plug-in: report it and go on
            traceback.print_exc()
            answer = {"ok": False, "error": f"internal error: {error!r}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        gc.collect()  # now, because sessions run without garbage collection


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvstream.testbed.receiver", description="A warm receiver process.")
    parser.add_argument("--model", default="bundled", help="folder or name; default: the bundled model")
    parser.add_argument("--workload", help="a synthetic workload instead of a model: compute takes its profile's times")
    parser.add_argument("--store", required=True, help="questions, references and chunks to measure on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--pages-on", nargs="+", default=[], metavar="DEVICE",
        help="decode into paged blocks, the layers shared out to these devices; the first is --device's",
    )  # fmt: skip
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16")
    parser.add_argument("--codec", action="append", default=[], metavar="FILE:CLASS", help="a codec from a file")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: half the cores")
    options = parser.parse_args(arguments)
    # libraries may print to stdout, which here is for answers only
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        go_before_others(Urgency.COMPUTE)  # inherited by the threads that compute
        threads = set_threads(options.threads)
        for codec in options.codec:
            codec_spec(codec)
        store = open_store(options.store, create=False)
        if options.workload:
            if options.pages_on:
                raise SpecError("--pages-on needs a model; omit it with --workload")
            from kvstream.testbed.receiver.timed_worker import TimedWorker

            timed = TimedWorker(options.workload, store)
            worker: Worker = timed
            identity = {"model": "", "name": timed.workload.name}
        else:
            model = load_model(options.model, device=options.device, dtype=options.dtype)
            on_cpu = model.device.type == "cpu"
            network = None if on_cpu else NetworkProcess()  # links that slow nothing down need no second process
            shared = None if network is None else network.memory
            engine = ModelEngine(model, pages_on=options.pages_on, shared=shared)
            worker = ModelWorker(engine, store, Experience() if on_cpu else None, network)
            identity = {"model": model.fingerprint, "name": model.name}
    except REFUSALS as error:
        print(f"receiver: {error}", file=sys.stderr)
        return 2
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    scheduling = be_punctual(Urgency.NETWORK)  # this thread only: the network's
    ready = {"ready": True, **identity, "threads": threads, "scheduling": scheduling}
    answers.write(json.dumps(ready) + "\n")
    answers.flush()
    try:
        asyncio.run(obey_lines(worker, sys.stdin, answers))
    finally:
        worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
