"""A receiver's worker for a synthetic workload: compute takes the times of its profile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from kvstream.testbed.config.build import make_policy
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.timed_engine import TimedEngine, wait_until
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.receiver.background_load import GemvLoop
from kvstream.testbed.receiver.driver import Fetched, fetch_session
from kvstream.testbed.receiver.worker import Worker, no_collection, record_json, settings_of
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.simulator.concurrent import Request
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.workloads import synthetic


class TimedWorker(Worker):
    """No model, no questions, costs from the profile."""

    def __init__(self, workload: str, store: ContextStore) -> None:
        self.workload = synthetic.parse(workload)
        self.engine = TimedEngine(self.workload)
        self._costs: dict[str, Costs] = {}
        super().__init__(self.engine, store)

    async def prepare(self, context: str) -> Costs:
        if context not in self._costs:
            manifest = self.store.manifest(context)
            self.engine.reserve(manifest)
            self._costs[context] = self.workload.costs(manifest)
        return self._costs[context]

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        match command.get("cmd"):
            case "group":
                return await self.group(command)
            case "request":
                return await self.request(command)
        return await super().obey(command)

    async def group(self, command: dict[str, Any]) -> dict[str, Any]:
        """Several requests at once, which share one link and one decoder.

        {"cmd": "group", "url": ..., "start_s": ..., "requests": [{"context": ..., "policy": "cachegen",
         "deadline_s": 2.0, "arrival_s": 0.0, "seed": 1}, ...], "batched": true, "window_s": 0.05, "max_batch": 10,
         "rtt_s": 0.0, "depth": 2, "padding_bytes": 0}
        {"ok": true, "status": "ok", "served": [{"record": {...}, "arrival_s": 0.0, "batch": 0}, ...]}
        """
        from kvstream.testbed.receiver.batch import fetch_batched, fetch_shared

        requests = []
        for given in command["requests"]:
            context = str(given["context"])
            requests.append(
                Request(
                    self.store.manifest(context),
                    make_policy(str(given["policy"])),
                    await self.prepare(context),
                    float(given["deadline_s"]),
                    float(given.get("arrival_s", 0.0)),
                    int(given.get("seed", 0)),
                )
            )
        start_s, padding = float(command["start_s"]), int(command.get("padding_bytes", 0))
        try:
            with no_collection():
                async with Client(str(command["url"])) as client:
                    if command["batched"]:
                        served = await fetch_batched(
                            client, requests, self.workload, start_s, window_s=float(command.get("window_s", 0.0)),
                            max_batch=int(command.get("max_batch", 10)), rtt_s=float(command.get("rtt_s", 0.0)),
                            padding_bytes=padding,
                        )  # fmt: skip
                    else:
                        depth = int(command.get("depth", 2))
                        served = await fetch_shared(
                            client, requests, self.workload, start_s, depth=depth, padding_bytes=padding
                        )
        except SessionFailed as error:
            return {"ok": True, "status": "failed", "error": str(error)}
        return {"ok": True, "status": "ok", "served": [asdict(one) for one in served]}

    async def request(self, command: dict[str, Any]) -> dict[str, Any]:
        """One of many requests in time: what the store holds of its prompt is fetched, the rest computed.

        {"cmd": "request", "url": ..., "context": "kvstream-4096-..." or null, "tokens": 700, "policy": "cachegen",
         "deadline_s": 2.0, "depth": 2, "seed": 1}
        {"ok": true, "status": "ok", "end_s": CLOCK_MONOTONIC of the first token, "busy_s": 0.2,
         "record": {...} or null}

        `tokens` are those to be computed. The deadline counts from now.
        """
        tokens = int(command["tokens"])
        if command["context"] is None:
            step = await asyncio.wrap_future(self.engine.submit(_compute, self.workload.forward_s(0, tokens)))
            return {
                "ok": True,
                "status": "ok",
                "end_s": step.end_s,
                "busy_s": step.end_s - step.start_s,
                "record": None,
            }
        context = str(command["context"])
        costs = await self.prepare(context)
        held = self.store.manifest(context).tokens
        try:
            with no_collection():
                async with Client(str(command["url"])) as client:
                    fetched = await fetch_session(
                        client, context, make_policy(str(command["policy"])), settings_of(command), engine=self.engine,
                        costs=replace(costs, prefill_s=self.workload.forward_s(held, held + tokens)),
                        prompt_ids=(0,) * tokens,
                    )  # fmt: skip
        except SessionFailed as error:
            return {"ok": True, "status": "failed", "error": str(error)}
        record = fetched.record
        spans = [(one.decode_start_s, one.decode_end_s) for one in record.chunks]
        busy_s = sum(end - start for start, end in spans if start is not None and end is not None)
        busy_s += record.ttft_s - fetched.prefill_start_s
        end_s = fetched.zero_s + record.ttft_s
        return {"ok": True, "status": "ok", "end_s": end_s, "busy_s": busy_s, "record": record_json(record)}

    def _reserve(self, contexts: Sequence[str]) -> None:
        pass

    def _question(self, context: str, number: int) -> tuple[int, Sequence[int]]:
        return 0, (0,) * self.workload.prompt

    def _evaluate(self, context: str, question: int, fetched: Fetched) -> asyncio.Future[dict[str, Any]]:
        raise SpecError('a synthetic workload has no answers; give "evaluate": false')

    def _start_load(self) -> GemvLoop:
        raise SpecError("a background load needs a model; a synthetic workload has none")


def _compute(cost_s: float) -> Step:
    start_s = time.monotonic()
    wait_until(start_s + cost_s)
    return Step(start_s, time.monotonic(), 0)
