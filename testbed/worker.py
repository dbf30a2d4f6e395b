"""A warm receiver process: sessions on command, one JSON object a line on stdin, one answer a line on stdout.

    python -m testbed.receiver --model PATH_OR_NAME --store DIR [--threads N] [--device cpu] [--pages-on DEVICE ...]
    python -m testbed.receiver --workload mistral-7b,compute=a40 --store DIR      compute by profile: testbed.profiled

`--store` is the receiver's own copy of what a session is judged by (questions, exact log-probabilities) and of the
chunks that the costs are measured on before any session; sessions themselves take everything from the sender. When
the model is loaded the process prints `{"ready": true, "model": "<fingerprint>", "threads": 1, ...}`, and then obeys:

    {"cmd": "prepare", "contexts": ["docs-raw-1"]}
        builds codecs, warms every code path, measures: {"ok": true, "costs": {"docs-raw-1": {"decode_s": [[...]],
        "recompute_s": [...], "prefill_s": 0.04}}}
    {"cmd": "rehearse", "contexts": ["docs-raw-1"], "url": "http://10.0.0.1:8700"}       optional: "others"
        holds sessions to learn what costs are in sessions (testbed.rehearsal): {"ok": true, "strain": {"docs-raw-1":
        {"decode": 1.8, "recompute": 1.3, "prefill": 1.5}}}
    {"cmd": "session", "url": "http://10.0.0.1:8700", "context": "docs-raw-1", "policy": "cachegen",
     "deadline_s": 1.0, ...}
        optional: "question": 0 (index of the timed one), "depth": 2, "overlap": true, "cold": false,
        "padding_bytes": 0, "start_s": null (CLOCK_MONOTONIC), "prior_bps": null, "concurrent": 1, "seed": 0,
        "steps": null (the shaper's socket, told as each chunk's first byte comes),
        "others": ["http://10.1.1.1:8700", ...] (senders of the other chunks: see testbed.spread),
        "news": {"file": "/.../events.jsonl", "unit_id": "003", "scheme": "cachegen"} (told how the chunks get on),
        "evaluate": true, "limits": {"stall_s": 5, "reconnects": 3, "session_s": 120},
        "forecast": {"durations_s": [...], "rates_bps": [...], "end": "hold", "rtt_s": 0.04,
                     "initial_window_bytes": null}   (goodput from the session's start; for clairvoyant policies)
        {"ok": true, "status": "ok", "record": {...}, "token": 51, "zero_s": ..., "late_s": ..., "rtt_s": ...,
         "answer_ok": true, "answers_right": 7, "answers": 8, "measured_kl": 0.0021, ...,
         "strain": {"decode": 1.8, ...}}     (what the costs were corrected by)
        {"ok": true, "status": "failed", "error": "the sender is lost after 3 reconnections: ..."}
    {"cmd": "quit"}

What cannot be meant is answered with `{"ok": false, "error": "..."}` and the process goes on. It ends with its stdin.
The bearer token, where the sender needs one, is in the environment variable KVSTREAM_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from codec.errors import CodecError
from policies.api import Forecast, LevelOrText, Policy
from policies.errors import PolicyError
from testbed import gemv
from testbed.client import Client
from testbed.compute import Compute, measure_decoding, measure_model, set_threads
from testbed.dashboard.teller import Teller
from testbed.emulator.clock import be_punctual
from testbed.emulator.replay import teller
from testbed.errors import SpecError
from testbed.guard import TimedAsk
from testbed.llm import SIDE_BY_SIDE_TOKENS, Model, Question, mean_kl
from testbed.plugs import make_policy
from testbed.receiver import Fetched, Limits, fetch_session
from testbed.rehearsal import REHEARSALS, Experience, Rehearsal, Strain
from testbed.session import Costs, SessionFailed, SessionRecord
from testbed.store import Store, chunk_id
from traces.errors import TraceError
from traces.trace import Trace

REHEARSAL_S = 60.0
"""A deadline that a rehearsal has no use for."""
REFUSALS = (SpecError, CodecError, PolicyError, TraceError)


class Worker:
    """The state between commands: a model, a store to judge by, the costs measured so far."""

    def __init__(self, compute: Compute, store: Store, *, learns: bool) -> None:
        """`learns`: correct the costs by what sessions take. A GPU's steps have the GPU to themselves."""
        self.compute = compute
        self.store = store
        self._costs: dict[str, Costs] = {}
        """[context]: what its steps take alone."""
        self._model_costs: dict[tuple[Any, ...], tuple[tuple[float, ...], float]] = {}
        """[chunks, tokens of the prompt]: recomputing and prefill, which are the same for every codec."""
        self._experience = Experience() if learns else None
        self._load: gemv.GemvLoop | None = None

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command. Raises what REFUSALS lists."""
        match command.get("cmd"):
            case "prepare":
                contexts = [str(context) for context in command["contexts"]]
                self._make_room(contexts)
                return {"ok": True, "costs": {context: asdict(await self.prepare(context)) for context in contexts}}
            case "rehearse":
                return await self.rehearse([str(context) for context in command["contexts"]], command)
            case "session":
                return await self.session(command)
        raise SpecError(f"command {command.get('cmd')!r} is unknown; there are prepare, rehearse, session and quit")

    async def prepare(self, context: str) -> Costs:
        """Build a context's codec, allocate for it, and measure what its steps take here."""
        if context not in self._costs:
            # on the thread that sessions compute on, whose scheduling and warm libraries count
            self._costs[context] = await asyncio.wrap_future(self.compute.submit(self._measure, context))
            gc.collect()
            gc.freeze()
        return self._costs[context]

    def _measure(self, context: str) -> Costs:
        manifest = self.store.manifest(context)
        if self.compute.lacks_profile(manifest):
            assert manifest.profile is not None
            self.compute.add_profile(self.store.profile(manifest.profile))
        questions = self.store.questions(context)
        longest = max(questions, key=_length)
        self.compute.reserve(self._room(context))
        for length in sorted({len(question.prompt_ids) for question in questions}):
            self.compute.capture(manifest.tokens, length)

        def get(chunk: int, level: LevelOrText) -> bytes:
            return self.store.get_kv(chunk_id(context, chunk), level)

        self.compute.open(manifest, len(longest.prompt_ids))
        same = (*((chunk.start, chunk.stop) for chunk in manifest.chunks), len(longest.prompt_ids))
        if same not in self._model_costs:
            self._model_costs[same] = measure_model(self.compute, manifest, get, longest.prompt_ids)
        return Costs(measure_decoding(self.compute, manifest, get), *self._model_costs[same])

    def _make_room(self, contexts: Sequence[str]) -> None:
        """Memory for the longest of these contexts; at once for all, because what is captured on a cache goes with
        it."""
        self.compute.reserve(max(map(self._room, contexts), default=0))

    def _room(self, context: str) -> int:
        """Tokens of a context and of what is asked after it."""
        tokens = self.store.manifest(context).tokens
        return tokens + max(SIDE_BY_SIDE_TOKENS, *map(_length, self.store.questions(context)))

    async def rehearse(self, contexts: Sequence[str], command: dict[str, Any]) -> dict[str, Any]:
        """Hold sessions to learn from, REHEARSALS for each codec."""
        groups: dict[str, list[str]] = {}
        for context in contexts:
            groups.setdefault(self._codec_key(context), []).append(context)
        for group in groups.values() if self._experience is not None else ():
            for context in group * -(-REHEARSALS // len(group)):
                _, prompt_ids = self._question(context, {})
                try:
                    await self._fetch(command, context, Rehearsal(), REHEARSAL_S, prompt_ids=prompt_ids)
                except SessionFailed as error:
                    raise SpecError(f"the rehearsal of {context} failed: {error}") from error
        return {"ok": True, "strain": {context: asdict(self._strain(context)) for context in contexts}}

    async def _fetch(
        self, command: dict[str, Any], context: str, policy: Policy, deadline_s: float, **settings: Any
    ) -> Fetched:
        """A session with the senders of a command; it is learned from."""
        alone = await self.prepare(context)
        async with contextlib.AsyncExitStack() as stack:
            client, *others = [
                await stack.enter_async_context(Client(str(url)))
                for url in (command["url"], *command.get("others", ()))
            ]
            fetched = await fetch_session(
                client,
                context,
                policy,
                deadline_s,
                compute=self.compute,
                costs=self._strain(context).on(alone),
                others=others,
                on_chunk=stack.enter_context(teller(command.get("steps"))),
                **settings,
            )
        if self._experience is not None:
            prefill_s = fetched.record.ttft_s - fetched.prefill_start_s
            self._experience.learn(self._codec_key(context), alone, fetched.record, prefill_s)
        return fetched

    def _strain(self, context: str) -> Strain:
        return Strain() if self._experience is None else self._experience.strain(self._codec_key(context))

    def _codec_key(self, context: str) -> str:
        return json.dumps(self.store.manifest(context).codec, sort_keys=True)

    async def session(self, command: dict[str, Any]) -> dict[str, Any]:
        """One session, and afterwards what its cache was worth."""
        context = str(command["context"])
        index, prompt_ids = self._question(context, command)
        policy = make_policy(str(command["policy"]))
        strain = self._strain(context)
        load = self._begin_load() if command.get("load") else None
        try:
            fetched = await self._fetch(
                command,
                context,
                policy,
                float(command["deadline_s"]),
                prompt_ids=prompt_ids,
                depth=int(command.get("depth", 2)),
                overlap=bool(command.get("overlap", True)),
                cold=bool(command.get("cold", False)),
                padding_bytes=int(command.get("padding_bytes", 0)),
                start_s=command.get("start_s"),
                forecast=_forecast(command),
                prior_bps=command.get("prior_bps"),
                concurrent=int(command.get("concurrent", 1)),
                seed=int(command.get("seed", 0)),
                ask=TimedAsk(),
                limits=Limits(**command.get("limits", {})),
                tell=_teller(command),
            )
        except SessionFailed as error:
            return {"ok": True, "status": "failed", "error": str(error)}
        finally:
            rounds = [] if load is None else load.stop()
        result = {"ok": True, "status": "ok", **session_json(fetched), "strain": asdict(strain)}
        if rounds:
            # to the last decoding, before the prompt's prefill
            result["load"] = gemv.slowdown(rounds, fetched.zero_s, fetched.zero_s + fetched.prefill_start_s)
        if command.get("evaluate", True):
            result |= await asyncio.wrap_future(self.compute.submit(self._judge, context, index, fetched))
        return result

    def _begin_load(self) -> gemv.GemvLoop:
        if self._load is None:
            self._load = gemv.GemvLoop(self.compute.model.device)
        self._load.start()
        return self._load

    def _question(self, context: str, command: dict[str, Any]) -> tuple[int, Sequence[int]]:
        """Number and prompt of the question whose first token is timed."""
        questions = self.store.questions(context)
        index = int(command.get("question", 0)) % len(questions)
        return index, questions[index].prompt_ids

    def _judge(self, context: str, index: int, fetched: Fetched) -> dict[str, Any]:
        """A passage of text and all questions over the cache that arrived, against the exact cache."""
        questions = self.store.questions(context)
        score = self.compute.ask(questions, self.store.passage(context))
        return {
            "answer_ok": score.right[index] and fetched.token == questions[index].answer_ids[0],
            "answers_right": sum(score.right),
            "answers": len(questions),
            "measured_kl": mean_kl(self.store.reference(context), score.log_probs),
        }


def _length(question: Question) -> int:
    return len(question.prompt_ids) + len(question.answer_ids)


def session_json(fetched: Fetched) -> dict[str, Any]:
    """A session as JSON values."""
    body = asdict(fetched)
    body["record"] = record_json(fetched.record)
    return body


def record_json(record: SessionRecord) -> dict[str, Any]:
    return {**asdict(record), "met": record.met}


def _forecast(command: dict[str, Any]) -> Forecast | None:
    given = command.get("forecast")
    if given is None:
        return None
    goodput = Trace(
        "forecast",
        given["durations_s"],
        given["rates_bps"],
        end=given.get("end", "hold"),
        per=given.get("per", "time"),
    )
    return Forecast(goodput, float(given["rtt_s"]), int(command.get("depth", 2)), given.get("initial_window_bytes"))


def _teller(command: dict[str, Any]) -> Teller | None:
    given = command.get("news")
    return None if given is None else Teller(Path(given["file"]), given["unit_id"], given["scheme"])


async def obey_lines(worker: Worker, commands: IO[str], answers: IO[str]) -> None:
    """One answer a command, until `quit` or the end of input."""
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
            answer = {"ok": False, "error": f"this command cannot be read: {error!r}"}
        except Exception as error:  # a fault of ours or of a plug-in: said, and the next command gets its chance
            traceback.print_exc()
            answer = {"ok": False, "error": f"internal error: {error!r}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        gc.collect()  # now, because sessions run without collection


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed.receiver", description="A warm receiver process.")
    parser.add_argument("--model", default="bundled", help="folder or name; default: the bundled model")
    parser.add_argument("--workload", help="a synthetic workload instead of a model: compute takes its profile's times")
    parser.add_argument("--store", type=Path, required=True, help="questions, references and chunks to measure on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--pages-on", nargs="+", default=[], metavar="DEVICE",
        help="decode into paged blocks, each device its share of the layers; --device first",
    )  # fmt: skip
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: half the cores")
    options = parser.parse_args(arguments)
    # libraries may print to stdout, which here is for answers only
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        threads = set_threads(options.threads)
        store = Store(options.store, create=False)
        if options.workload:
            if options.pages_on:
                raise SpecError("--pages-on needs a model; a workload has none")
            from testbed.profiled import ProfiledWorker

            profiled = ProfiledWorker(options.workload, store)
            worker: Worker = profiled
            who = {"model": "", "name": profiled.workload.name}
        else:
            model = Model.load(options.model, device=options.device, dtype=options.dtype)
            worker = Worker(Compute(model, pages_on=options.pages_on), store, learns=model.device.type == "cpu")
            who = {"model": model.fingerprint, "name": model.name}
    except REFUSALS as error:
        print(f"receiver: {error}", file=sys.stderr)
        return 2
    scheduling = be_punctual()  # this thread only: the network's
    ready = {"ready": True, **who, "threads": threads, "scheduling": scheduling}
    answers.write(json.dumps(ready) + "\n")
    answers.flush()
    try:
        asyncio.run(obey_lines(worker, sys.stdin, answers))
    finally:
        worker.compute.close()
    return 0
