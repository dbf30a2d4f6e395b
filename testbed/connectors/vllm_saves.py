"""Saving contexts out of vLLM's blocks: encoded on a thread of their own, then put into a sender. Needs no vLLM."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import aiohttp

from kvstream.codec import registry
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from kvstream.testbed.connectors.vllm_blocks import Blocks, kernel_table
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from kvstream.codec.api import Codec

log = logging.getLogger("kvstream.connectors")

CODEC: Final = "kvstream"
CHUNK_TOKENS: Final = 256
MAX_WAITING: Final = 4
"""Caches that wait for being encoded; further ones are not saved."""


@dataclass(frozen=True)
class Save:
    """A prompt whose cache is complete once the step with this is over."""

    context: str
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    block_tokens: int


@dataclass(frozen=True)
class _Recipe:
    model: str
    codec: Codec
    chunk_tokens: int
    distortions: tuple[float, ...]


class Saver:
    """Saves contexts of one model."""

    def __init__(self, url: str, blocks: Blocks, model: Callable[[], str], vocabulary: int) -> None:
        """`model` gives its fingerprint, and is called when the first context is saved; `vocabulary` is the number of
        its tokens."""
        self._url, self._blocks, self._model, self._vocabulary = url, blocks, model, vocabulary
        self._recipe: _Recipe | None = None
        self._waiting = 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstream-saves")

    def begin(self, save: Save) -> None:
        """Copy the cache out of the blocks now; the rest happens later."""
        if self._waiting >= MAX_WAITING:
            log.warning("context %s is not saved: %d others wait for that", save.context, self._waiting)
            return
        table = kernel_table(save.blocks, save.block_tokens, self._blocks.block_tokens)
        kv = self._blocks.read(table, len(save.token_ids)).cpu()
        self._waiting += 1
        self._executor.submit(self._save, save, kv)

    def close(self) -> None:
        """Wait for what has begun; the rest is dropped."""
        self._executor.shutdown(cancel_futures=True)

    def _save(self, save: Save, kv: Tensor) -> None:
        try:
            asyncio.run(self._put(save, kv))
            log.info("context %s is saved: %d tokens", save.context, len(save.token_ids))
        except (SpecError, CodecError, OSError, aiohttp.ClientError) as error:
            log.warning("context %s is not saved: %s", save.context, error)
        except Exception:
            log.exception("context %s is not saved", save.context)
        finally:
            self._waiting -= 1

    async def _put(self, save: Save, kv: Tensor) -> None:
        from kvstream.testbed.encoding.encode import store_cache

        async with Client(self._url) as client:
            if self._recipe is None:
                model = self._model()
                self._recipe = _known_here(model) or await _as_on_the_sender(client, model)
            with tempfile.TemporaryDirectory(prefix="kvstream-") as folder:
                store = Store(folder)
                store_cache(
                    store, save.context, save.token_ids, kv, self._recipe.codec, model=self._recipe.model,
                    vocabulary=self._vocabulary, chunk_tokens=self._recipe.chunk_tokens,
                    distortions=self._recipe.distortions,
                )  # fmt: skip
                await client.store_kv(store, save.context)


def _known_here(model: str) -> _Recipe | None:
    """Our codec with a profile that is shipped, or was made on this machine."""
    from kvstream.testbed.encoding.calibrate import existing_distortions, existing_profile

    profile = existing_profile(CODEC, model)
    if profile is None:
        return None
    codec = registry.make(CODEC, {}, profile)
    distortions = existing_distortions(model, codec, CHUNK_TOKENS)
    return None if distortions is None else _Recipe(model, codec, CHUNK_TOKENS, distortions)


async def _as_on_the_sender(client: Client, model: str) -> _Recipe:
    """As the sender's first context of the model is encoded. Raises SpecError if it has none."""
    for name in await client.contexts():
        manifest = await client.manifest(name)
        if manifest.model == model:
            data = None if manifest.profile is None else await client.profile(manifest.profile)
            codec = registry.from_config(manifest.codec, None if data is None else Profile.from_bytes(data))
            return _Recipe(
                model, codec, manifest.chunks[0].tokens, tuple(level.distortion for level in manifest.levels)
            )
    raise SpecError(
        "neither this machine nor the sender has a profile of this model; store a first context of it: "
        "kvstream store CONTEXT --model MODEL"
    )
