"""`kvstream fetch` with a model: one session against any sender, and how the model continues the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvstream.policies.api import LevelOrText
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.measure import measure_costs
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.engine.threads import set_threads
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.receiver.driver import fetch_session
from kvstream.testbed.receiver.examiner import answer
from kvstream.testbed.session.ask import ask_in_session
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.trial import try_policy
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import chunk_id


@dataclass(frozen=True)
class Answer:
    """A session and the text that it was for."""

    record: SessionRecord
    text: str

    def to_json(self) -> dict[str, Any]:
        return self.record.to_json() | {"met": self.record.met, "text": self.text}

    def describe(self) -> str:
        return f"TTFT {self.record.describe()}\n{self.text}"


def fetch_answer(
    url: str, context: str, policy: str, deadline_s: float, model_source: str, prompt: str, tokens: int
) -> Answer:
    """Fetch a context, by its id or name, under a policy and continue `prompt` by `tokens` tokens.

    What compute takes here is measured first, on the context's own chunks. Raises SpecError for an absent sender and
    for an unknown context or policy.
    """
    try_policy(policy)
    make_policy(policy)
    set_threads(None)
    model = load_model(None if model_source == "bundled" else model_source)
    prompt_ids = model.encode(prompt or "\n")
    engine = ModelEngine(model)
    try:
        try:
            manifest, profile = asyncio.run(_offer(url, context))
            costs = _costs(engine, url, manifest, profile, prompt_ids, tokens)
        except (OSError, aiohttp.ClientError) as error:
            raise SpecError(f"no sender at {url} ({error}); start one: kvstream serve") from error
        try:
            record = asyncio.run(_session(engine, costs, url, manifest.context, policy, deadline_s, prompt_ids))
        except SessionFailed as error:
            raise SpecError(f"the session failed: {error}") from error
        return Answer(record, model.decode(answer(engine, prompt_ids, tokens)))
    finally:
        engine.close()


async def _session(
    engine: ModelEngine, costs: Costs, url: str, context: str, policy: str, deadline_s: float, prompt_ids: Sequence[int]
) -> SessionRecord:
    chosen = make_policy(policy)
    async with Client(url) as client:
        fetched = await fetch_session(
            client,
            context,
            chosen,
            SessionSettings(deadline_s),
            engine=engine,
            costs=costs,
            prompt_ids=prompt_ids,
            ask=ask_in_session(chosen),
        )
    return fetched.record


def _costs(
    engine: ModelEngine, url: str, manifest: Manifest, profile: bytes | None, prompt_ids: Sequence[int], tokens: int
) -> Costs:
    """Get ready for a context: its profile, memory for it, and what its steps take here."""
    if profile is not None:
        engine.add_profile(profile)
    engine.reserve(manifest.tokens + len(prompt_ids) + tokens)
    return measure_costs(
        engine, manifest, lambda chunk, level: asyncio.run(_chunk(url, manifest.context, chunk, level)), prompt_ids
    )


async def _offer(url: str, context: str) -> tuple[Manifest, bytes | None]:
    async with Client(url) as client:
        manifest = await client.find(context)
        return manifest, None if manifest.profile is None else await client.profile(manifest.profile)


async def _chunk(url: str, context: str, chunk: int, level: LevelOrText) -> bytes:
    async with Client(url) as client:
        return await client.get_kv(chunk_id(context, chunk), level)
