"""`kvstream fetch`: one session against any sender, and the text that the model goes on with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from policies.api import LevelOrText
from testbed.client import Client
from testbed.compute import Compute, measure_costs, set_threads
from testbed.errors import SpecError
from testbed.guard import TimedAsk
from testbed.llm import Model
from testbed.manifest import Manifest
from testbed.plugs import make_policy
from testbed.receiver import fetch_session
from testbed.session import Costs, SessionFailed, SessionRecord
from testbed.store import chunk_id


@dataclass(frozen=True)
class FetchResult:
    """A session and what it was for."""

    record: SessionRecord
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self.record) | {"met": self.record.met, "text": self.text}

    def describe(self) -> str:
        record = self.record
        levels = " ".join("t" if level == "text" else str(level) for level in record.levels)
        verdict = "met" if record.met else "missed"
        return (
            f"TTFT {record.ttft_s:.3f} s, deadline {record.deadline_s:g} s {verdict}; {record.bytes} bytes, "
            f"levels {levels}, distortion {record.distortion:.2g} nats\n{self.text}"
        )


def fetch(
    url: str, context: str, policy: str, deadline_s: float, model_source: str, prompt: str, tokens: int
) -> FetchResult:
    """Fetch a context under a policy and continue `prompt` by `tokens` tokens.

    What computing takes here is measured before, on the context's own chunks. Raises SpecError for a sender, context
    or policy that is not there.
    """
    make_policy(policy)
    set_threads(None)
    model = Model.load(None if model_source == "bundled" else model_source)
    prompt_ids = model.encode(prompt or "\n")
    compute = Compute(model)
    try:
        try:
            costs = _costs(compute, url, context, prompt_ids, tokens)
        except (OSError, aiohttp.ClientError) as error:
            raise SpecError(f"no sender answers at {url} ({error}); start one: kvstream serve STORE") from error
        try:
            record = asyncio.run(_session(compute, costs, url, context, policy, deadline_s, prompt_ids))
        except SessionFailed as error:
            raise SpecError(f"the session failed: {error}") from error
        return FetchResult(record, model.decode(compute.answer(prompt_ids, tokens)))
    finally:
        compute.close()


async def _session(
    compute: Compute, costs: Costs, url: str, context: str, policy: str, deadline_s: float, prompt_ids: Sequence[int]
) -> SessionRecord:
    async with Client(url) as client:
        fetched = await fetch_session(
            client,
            context,
            make_policy(policy),
            deadline_s,
            compute=compute,
            costs=costs,
            prompt_ids=prompt_ids,
            ask=TimedAsk(),
        )
    return fetched.record


def _costs(compute: Compute, url: str, context: str, prompt_ids: Sequence[int], tokens: int) -> Costs:
    """Get ready for a context: its profile, room for it, and what its steps take here."""
    manifest, profile = asyncio.run(_offer(url, context))
    if profile is not None:
        compute.add_profile(profile)
    compute.reserve(manifest.tokens + len(prompt_ids) + tokens)
    return measure_costs(
        compute, manifest, lambda chunk, level: asyncio.run(_chunk(url, context, chunk, level)), prompt_ids
    )


async def _offer(url: str, context: str) -> tuple[Manifest, bytes | None]:
    async with Client(url) as client:
        manifest = await client.manifest(context)
        return manifest, None if manifest.profile is None else await client.profile(manifest.profile)


async def _chunk(url: str, context: str, chunk: int, level: LevelOrText) -> bytes:
    async with Client(url) as client:
        return await client.get_kv(chunk_id(context, chunk), level)
