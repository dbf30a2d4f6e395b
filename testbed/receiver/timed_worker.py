"""A receiver's worker for a synthetic workload: compute takes the times of its profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvstream.testbed.config.build import make_policy
from kvstream.testbed.engine.timed_engine import TimedEngine
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.receiver.background_load import GemvLoop
from kvstream.testbed.receiver.driver import Fetched
from kvstream.testbed.receiver.worker import Worker, no_collection
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
        if command.get("cmd") == "group":
            return await self.group(command)
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

    def _reserve(self, contexts: Sequence[str]) -> None:
        pass

    def _question(self, context: str, number: int) -> tuple[int, Sequence[int]]:
        return 0, (0,) * self.workload.prompt

    async def _evaluate(self, context: str, question: int, fetched: Fetched) -> dict[str, Any]:
        raise SpecError('a synthetic workload has no answers; give "evaluate": false')

    def _start_load(self) -> GemvLoop:
        raise SpecError("a background load needs a model; a synthetic workload has none")
