"""What a receiver process does on command, whatever its engine: prepare contexts, warm up, hold sessions."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from kvstream.codec.errors import CodecError
from kvstream.policies.api import Forecast, Policy
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.emulator.replay import notify_shaper
from kvstream.testbed.engine.api import Engine
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Limits
from kvstream.testbed.net.network_process import NetworkProcess
from kvstream.testbed.receiver import background_load
from kvstream.testbed.receiver.chunk_events import ChunkEventWriter
from kvstream.testbed.receiver.driver import Fetched, OnReady, fetch_session
from kvstream.testbed.receiver.warmup import WARM_UPS, Experience, WarmUp, round_trip_s
from kvstream.testbed.session.ask import ask_in_session
from kvstream.testbed.session.costs import Costs, Slowdown
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.session import Session
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.store.api import ContextStore
from kvstream.traces.errors import TraceError
from kvstream.traces.fluid import FluidLink
from kvstream.traces.trace import Trace

WARM_UP_S: Final = 60.0
"""The deadline of a warm-up, which has no use for one."""
COMMANDS: Final = ("prepare", "warm_up", "session", "ready", "start", "judge", "quit")
REFUSALS: Final = (SpecError, CodecError, PolicyError, TraceError)


@dataclass(frozen=True)
class _Held:
    """A session that is ready and waits for its start."""

    start_s: asyncio.Future[float]
    """CLOCK_MONOTONIC"""
    task: asyncio.Task[dict[str, Any]]


class Worker(ABC):
    """The state between commands: an engine, a store, what was learned of compute in sessions."""

    def __init__(
        self,
        engine: Engine,
        store: ContextStore,
        experience: Experience | None = None,
        network: NetworkProcess | None = None,
    ) -> None:
        """With `experience`, costs are corrected by what sessions take; a GPU's steps have the GPU to themselves. With
        `network` that process receives."""
        self._engine = engine
        self._network = network
        self.store = store
        self._experience = experience
        self._held: _Held | None = None
        self._last: tuple[str, int, Fetched] | None = None
        """Context, question and outcome of the session whose cache the engine still holds."""

    @abstractmethod
    async def prepare(self, context: str) -> Costs:
        """Get ready for a context; what its steps take alone."""

    @abstractmethod
    def _reserve(self, contexts: Sequence[str]) -> None:
        """Take the memory for any of these contexts."""

    @abstractmethod
    def _question(self, context: str, number: int) -> tuple[int, Sequence[int]]:
        """Number and prompt of the question whose first token is timed; numbers wrap around."""

    @abstractmethod
    def _evaluate(self, context: str, question: int, fetched: Fetched) -> asyncio.Future[dict[str, Any]]:
        """What the cache that arrived is worth. The engine begins at once, and only then with what comes later."""

    @abstractmethod
    def _start_load(self) -> background_load.GemvLoop:
        """Start a background load on the engine's device."""

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command. Raises what REFUSALS lists."""
        if command.get("cmd") != "start":
            await self._let_go()
        match command.get("cmd"):
            case "prepare":
                contexts = [str(context) for context in command["contexts"]]
                self._reserve(contexts)
                return {"ok": True, "costs": {context: asdict(await self.prepare(context)) for context in contexts}}
            case "warm_up":
                return await self.warm_up([str(context) for context in command["contexts"]], command)
            case "session":
                return await self.session(command)
            case "ready":
                return await self.get_ready(command)
            case "start":
                return await self.start(float(command["start_s"]))
            case "judge":
                return {"ok": True, "judgement": await self._judge_last()}
        raise SpecError(f"unknown command {command.get('cmd')!r}; choose from {', '.join(COMMANDS)}")

    def close(self) -> None:
        self._engine.close()
        if self._network is not None:
            self._network.close()

    async def get_ready(self, command: dict[str, Any]) -> dict[str, Any]:
        """All of a session that comes before its time 0, for `start` to go on with; the cache of the last one is judged
        beside it, before its memory is taken."""
        judging = self._judge_last() if command.get("judge") else None
        loop = asyncio.get_running_loop()
        ready, start_s = loop.create_future(), loop.create_future()

        async def on_ready() -> float:
            ready.set_result(None)
            return float(await start_s)

        task = asyncio.create_task(self.session(command, on_ready))
        await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            self._held = _Held(start_s, task)
        answer = {"ok": True, "status": "ready"} if ready.done() else task.result()
        return answer if judging is None else answer | {"judgement": await judging}

    async def start(self, start_s: float) -> dict[str, Any]:
        """Carry out the session that is ready; as `session` but for its judgement."""
        if self._held is None:
            raise SpecError("no session is ready; ready comes before start")
        held, self._held = self._held, None
        held.start_s.set_result(start_s)
        return await held.task

    async def _let_go(self) -> None:
        """Give up a session that was made ready and never begun."""
        held, self._held = self._held, None
        if held is not None:
            held.task.cancel()
            await asyncio.wait({held.task})

    def _judge_last(self) -> asyncio.Future[dict[str, Any]]:
        if self._last is None:
            raise SpecError("there is no cache to judge: judge comes after a session's first token")
        return self._evaluate(*self._last)

    async def warm_up(self, contexts: Sequence[str], command: dict[str, Any]) -> dict[str, Any]:
        """Hold sessions to learn from, at least WARM_UPS for each codec, also what a round trip takes."""
        groups: dict[str, list[str]] = {}
        round_trips = []
        for context in contexts:
            groups.setdefault(self._codec_key(context), []).append(context)
        for group in groups.values() if self._experience is not None else ():
            for context in group * -(-WARM_UPS // len(group)):
                _, prompt_ids = self._question(context, 0)
                try:
                    fetched = await self._fetch(
                        command, context, WarmUp(), SessionSettings(WARM_UP_S), prompt_ids=prompt_ids
                    )
                except SessionFailed as error:
                    raise SpecError(f"the warm-up of {context} failed: {error}") from error
                round_trips.append(round_trip_s(fetched.record))
        slowdown = {context: asdict(self._slowdown(context)) for context in contexts}
        return {"ok": True, "slowdown": slowdown, "round_trip_s": median(round_trips) if round_trips else None}

    async def session(self, command: dict[str, Any], on_ready: OnReady | None = None) -> dict[str, Any]:
        """One session and, unless it is held by `on_ready`, what its cache is worth."""
        context = str(command["context"])
        question, prompt_ids = self._question(context, int(command.get("question", 0)))
        policy = make_policy(str(command["policy"]))
        settings = settings_of(command)
        slowdown = self._slowdown(context)
        load = self._start_load() if command.get("load") else None
        try:
            fetched = await self._fetch(
                command,
                context,
                policy,
                settings,
                prompt_ids=prompt_ids,
                cold=bool(command.get("cold", False)),
                padding_bytes=int(command.get("padding_bytes", 0)),
                padding_until_s=command.get("padding_until_s"),
                start_s=command.get("start_s"),
                on_ready=on_ready,
                forecast=await self._forecast(command, context, policy, settings, slowdown),
                ask=ask_in_session(policy),
                limits=Limits(**command.get("limits", {})),
                on_chunks=_event_writer(command),
            )
        except SessionFailed as error:
            return {"ok": True, "status": "failed", "error": str(error)}
        finally:
            rounds = [] if load is None else load.stop()
        result = {"ok": True, "status": "ok", **session_json(fetched), "slowdown": asdict(slowdown)}
        if rounds:
            # to the last decoding, before the prompt's prefill
            result["load"] = background_load.slowdown(rounds, fetched.zero_s, fetched.zero_s + fetched.prefill_start_s)
        self._last = context, question, fetched
        if on_ready is None and command.get("evaluate", True):
            result |= await self._judge_last()
        return result

    async def _forecast(
        self, command: dict[str, Any], context: str, policy: Policy, settings: SessionSettings, slowdown: Slowdown
    ) -> Forecast | None:
        """What a clairvoyant policy is told."""
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
        rtt_s, manifest = float(given["rtt_s"]), self.store.manifest(context)
        costs = slowdown.on(await self.prepare(context))
        begun_s = FluidLink(goodput, rtt_s).transfer(0.0, len(manifest.wire))[1]
        first = Session(manifest, policy, settings, costs, rtt_s=rtt_s).observe(begun_s)
        return Forecast(goodput, rtt_s, settings.depth, given.get("initial_window_bytes"), first=first)

    async def _fetch(
        self, command: dict[str, Any], context: str, policy: Policy, settings: SessionSettings, **more: Any
    ) -> Fetched:
        """A session with the senders of a command, to learn from."""
        alone = await self.prepare(context)
        self._last = None
        async with contextlib.AsyncExitStack() as stack:
            client, *others = [
                await stack.enter_async_context(Client(str(url)))
                for url in (command["url"], *command.get("others", ()))
            ]
            stack.enter_context(no_collection())
            fetched = await fetch_session(
                client,
                context,
                policy,
                settings,
                engine=self._engine,
                costs=self._slowdown(context).on(alone),
                others=others,
                network=self._network,
                on_first_byte=stack.enter_context(notify_shaper(command.get("steps"))),
                **more,
            )
        if self._experience is not None:
            prefill_s = fetched.record.ttft_s - fetched.prefill_start_s
            self._experience.learn(self._codec_key(context), alone, fetched.record, prefill_s)
        return fetched

    def _slowdown(self, context: str) -> Slowdown:
        return Slowdown() if self._experience is None else self._experience.slowdown(self._codec_key(context))

    def _codec_key(self, context: str) -> str:
        return json.dumps(self.store.manifest(context).codec, sort_keys=True)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection while a session is timed: in a process of our own, not in one whose guest we are."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def session_json(fetched: Fetched) -> dict[str, Any]:
    """A session as JSON values."""
    body = asdict(fetched)
    body["record"] = record_json(fetched.record)
    return body


def record_json(record: SessionRecord) -> dict[str, Any]:
    return record.to_json() | {"met": record.met}


def settings_of(command: dict[str, Any]) -> SessionSettings:
    """A session's settings from its command."""
    return SessionSettings(
        float(command["deadline_s"]),
        depth=int(command.get("depth", 2)),
        overlap=bool(command.get("overlap", True)),
        prior_bps=command.get("prior_bps"),
        concurrent=int(command.get("concurrent", 1)),
        seed=int(command.get("seed", 0)),
    )


def _event_writer(command: dict[str, Any]) -> ChunkEventWriter | None:
    given = command.get("events")
    return None if given is None else ChunkEventWriter(Path(given["file"]), given["unit_id"], given["scheme"])
