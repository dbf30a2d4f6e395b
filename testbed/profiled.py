"""Compute by profile: a receiver whose decoding, recomputing and prefill take the times of a synthetic workload.

For workloads whose model this machine cannot run (`testbed.synthetic`): bytes come over the link for real, and a step
of compute is a wait, in line with the others on one thread, for as long as the compute profile says. Nothing is decoded
and no model runs, so there is no answer, and whatever is measured so is called synthetic.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from codec import container
from codec.errors import CodecError
from testbed import synthetic
from testbed.client import Client
from testbed.compute import Compute, Step
from testbed.concurrent import Request
from testbed.errors import SpecError
from testbed.landing import Inflow, Landing
from testbed.lanes import Lanes
from testbed.manifest import Manifest
from testbed.plugs import make_policy
from testbed.session import Costs, SessionFailed
from testbed.store import Store, token_ids
from testbed.worker import Worker

SPIN_S = 0.001
"""A sleep may be late by less than this; the rest of a step is spun away."""


class Profiled(Compute):
    """Stands in for `Compute`: the same calls, with the times of `costs`."""

    def __init__(self, workload: synthetic.Workload) -> None:
        # of the real one's state, only what needs no model
        self.lanes = Lanes()
        self.landing = Landing(self.lanes)
        self.places = 0
        self._cache = self._pages = None
        self._manifest: Manifest | None = None
        self._workload = workload
        self._costs: Costs | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    @property
    def thread(self) -> ThreadPoolExecutor:
        """What steps are carried out on, one after the other."""
        return self._thread

    def share(self, thread: ThreadPoolExecutor) -> None:
        """Compute on the thread of another: one decoder for several requests."""
        self._thread.shutdown()
        self._thread = thread

    def lacks_profile(self, manifest: Manifest) -> bool:
        return False

    def reserve(self, tokens: int) -> None:
        return None

    @property
    def decodes_pieces(self) -> bool:
        return False

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        """Get ready for a context of this workload. Raises SpecError for any other."""
        wanted = f"synthetic {self._workload.model}"
        if manifest.model != wanted or manifest.kv != self._workload.kv:
            raise SpecError(
                f"context {manifest.context} is of model {manifest.model}, this receiver stands for {wanted}"
            )
        self._manifest, self._costs = manifest, self._workload.costs(manifest)
        self.places = len(manifest.chunks)
        self.landing.open(manifest, self.places, mirrored=False)

    def decode(self, inflow: Inflow) -> Step:
        manifest, costs = self._opened()
        start_s = time.monotonic()
        assert isinstance(inflow.level, int)
        check_place(inflow.view, manifest.chunks[inflow.chunk].start, inflow.level)
        return _step(start_s, costs.decode_s[inflow.chunk][inflow.level])

    def recompute(self, chunk: int, data: memoryview) -> Step:
        manifest, costs = self._opened()
        assert costs.recompute_s is not None
        start_s = time.monotonic()
        try:
            token_ids(data, manifest.chunks[chunk].tokens)
        except SpecError as error:
            raise CodecError(f"text of chunk {chunk}: {error}") from error
        return _step(start_s, costs.recompute_s[chunk])

    def prefill(self, prompt_ids: Sequence[int]) -> Step:
        _, costs = self._opened()
        return _step(time.monotonic(), costs.prefill_s, token=0)

    def _opened(self) -> tuple[Manifest, Costs]:
        if self._manifest is None or self._costs is None:
            raise SpecError("no context is open")
        return self._manifest, self._costs


def check_place(data: memoryview, start: int, level: int) -> None:
    """Raise CodecError unless encoded bytes say that they are of this place and level.

    Only the header is read: checking every byte would take longer than the decoder that this stands for.
    """
    header = container.parse_header(data)
    if (header.start, header.level) != (start, level):
        raise CodecError(
            f"asked for tokens from {start} at level {level}, got tokens from {header.start} at level {header.level}"
        )


def wait_until(end_s: float) -> None:
    """Return at a moment of CLOCK_MONOTONIC."""
    rest_s = end_s - time.monotonic() - SPIN_S
    if rest_s > 0.0:
        time.sleep(rest_s)
    while time.monotonic() < end_s:
        pass


def _step(start_s: float, cost_s: float, token: int | None = None) -> Step:
    wait_until(start_s + cost_s)
    return Step(start_s, time.monotonic(), token)


class ProfiledWorker(Worker):
    """A receiver process for a synthetic workload: no model, no questions, costs from the profile."""

    def __init__(self, workload: str, store: Store) -> None:
        self.workload = synthetic.parse(workload)
        super().__init__(Profiled(self.workload), store, learns=False)

    async def prepare(self, context: str) -> Costs:
        if context not in self._costs:
            manifest = self.store.manifest(context)
            # memory is taken now, not in a session
            self.compute.landing.open(manifest, len(manifest.chunks), mirrored=False)
            self._costs[context] = self.workload.costs(manifest)
        return self._costs[context]

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        if command.get("cmd") == "group":
            return await self.group(command)
        return await super().obey(command)

    async def group(self, command: dict[str, Any]) -> dict[str, Any]:
        """Several requests at once, on one link and one decoder.

        {"cmd": "group", "url": ..., "start_s": ..., "requests": [{"context": ..., "policy": "cachegen",
         "deadline_s": 2.0, "arrival_s": 0.0, "seed": 1}, ...], "batched": true, "window_s": 0.05, "most": 10,
         "rtt_s": 0.0, "depth": 2, "padding_bytes": 0}
        {"ok": true, "status": "ok", "served": [{"record": {...}, "arrival_s": 0.0, "batch": 0}, ...]}
        """
        from testbed.group import fetch_batched, fetch_shared

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
            async with Client(str(command["url"])) as client:
                if command["batched"]:
                    served = await fetch_batched(
                        client, requests, self.workload, start_s, window_s=float(command.get("window_s", 0.0)),
                        most=int(command.get("most", 10)), rtt_s=float(command.get("rtt_s", 0.0)),
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

    def _make_room(self, contexts: Sequence[str]) -> None:
        return None

    def _question(self, context: str, command: dict[str, Any]) -> tuple[int, Sequence[int]]:
        return 0, (0,) * self.workload.prompt
