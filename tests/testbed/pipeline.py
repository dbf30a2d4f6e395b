"""Whole sessions over loopback with the bundled model under kvstream, on any device: what the CPU's and the GPU's tests
of the pipeline have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp.test_utils import TestServer

from kvstream.codec import registry
from kvstream.codec.api import Codec
from kvstream.policies.api import Choice, LevelOrText, Observation
from kvstream.testbed.encoding import calibrate
from kvstream.testbed.encoding.encode import store_kv
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model import Model, calculate_kv, generate_with_kv
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.receiver.driver import Fetched, Limits, fetch_session
from kvstream.testbed.receiver.examiner import answer
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads import contexts
from tests.testbed.link import Link

TOKENS, CHUNK_TOKENS, CONTEXT = 700, 128, "ctx"
LEVEL = 4
PROMPT = b"line "


@dataclass
class Plan:
    """Fetches chunk i at `levels[i]`, or all at one level."""

    levels: LevelOrText | tuple[LevelOrText, ...]
    asked: list[Observation] = field(default_factory=list)

    def choose(self, obs: Observation) -> Choice:
        self.asked.append(obs)
        return Choice(self.levels if isinstance(self.levels, int | str) else self.levels[obs.chunk])


@dataclass(frozen=True)
class Kitchen:
    """A receiver on a device, and a sender's store."""

    store: Store
    engine: ModelEngine
    codec: Codec
    tokens: list[int]

    @property
    def model(self) -> Model:
        return self.engine.model

    def run(
        self,
        policy: Any,
        *,
        change: Callable[[bytes], bytes] | None = None,
        rate_bps: float | None = None,
        **settings: Any,
    ) -> Fetched:
        """One session; `change` may damage what the link carries."""
        return asyncio.run(self._run(policy, change, rate_bps, settings))

    async def _run(
        self, policy: Any, change: Callable[[bytes], bytes] | None, rate_bps: float | None, settings: dict[str, Any]
    ) -> Fetched:
        manifest = self.store.manifest(CONTEXT)
        n = len(manifest.chunks)
        async with (
            asyncio.timeout(120),
            TestServer(Sender(self.store).app()) as server,
            Link(server.port or 0, rate_bps) as link,
            Client(link.url) as client,
        ):
            if change is not None:
                link.change = change
            return await fetch_session(
                client,
                CONTEXT,
                policy,
                SessionSettings(60.0, **settings),
                engine=self.engine,
                costs=Costs(((1e-3,) * len(manifest.levels),) * n, (1e-2,) * n, 1e-2),
                prompt_ids=list(PROMPT),
                limits=Limits(session_s=60.0),
            )

    def decoded(self, levels: tuple[int, ...]) -> torch.Tensor:
        """The cache that the CPU decodes from the same bytes."""
        manifest = self.store.manifest(CONTEXT)
        parts = [
            self.codec.decode(self.store.get_kv(f"{CONTEXT}/{i}", level))
            for i, level in zip(range(len(manifest.chunks)), levels, strict=True)
        ]
        return torch.cat(parts, dim=2)  # type: ignore[arg-type]

    def arrived(self) -> torch.Tensor:
        """The cache that a session left, on the CPU."""
        return self.engine.context.cache.view(0, len(self.tokens)).cpu()

    def check(self, levels: tuple[int, ...]) -> None:
        """What arrived is what the CPU decodes, and the model goes on with the same 32 tokens."""
        wanted, got = self.decoded(levels), self.arrived()
        assert bool(got.isfinite().all())
        rms = wanted.float().pow(2).mean(dim=2, keepdim=True).sqrt()
        ulp = torch.finfo(wanted.dtype).eps * wanted.abs().float()
        beyond = (got.float() - wanted.float()).abs() > torch.maximum(ulp, rms * 2.0**-14)
        assert not bool(beyond.any()), f"{int(beyond.sum())} of {beyond.numel()} elements differ by more than allowed"
        expected = generate_with_kv(self.model, wanted.to(self.model.device), list(PROMPT), 32)
        assert answer(self.engine, list(PROMPT), 32) == expected


def make(path: Path, device: str, **more: Any) -> Kitchen:
    """The bundled model in float32, so that its next tokens do not depend on rounding; `more` goes to the engine."""
    model = load_model(device=device, dtype="float32")
    codec = calibrate.make_codec("kvstream", model)
    tokens = model.encode(contexts.load_contexts()[0].text.decode())[:TOKENS]
    store = Store(path)
    n = len(codec.levels)
    kv = calculate_kv(model, tokens).cpu()
    store_kv(store, CONTEXT, tokens, model, codec, chunk_tokens=CHUNK_TOKENS, distortions=[0.0] * n, kv=kv)
    engine = ModelEngine(model, **more)
    engine.reserve(TOKENS + 64)
    return Kitchen(store, engine, registry.from_config(codec.get_config(), codec.profile), tokens)


def damage(times: int, start: int = 2 * CHUNK_TOKENS) -> Callable[[bytes], bytes]:
    """Flip a bit in what follows the header of the chunk that begins at a token, so many times."""
    left, tail, is_next = times, b"", False

    def change(data: bytes) -> bytes:
        nonlocal left, tail, is_next
        if is_next:
            left, is_next = left - 1, False
            data = data[:-1] + bytes([data[-1] ^ 1])
        seen = tail + data
        at = seen.find(b"KVST")
        tail = seen[-63:]
        if left and at >= 0 and seen[at + 56 : at + 64] == start.to_bytes(8, "little"):
            is_next, tail = True, b""
        return data

    return change
