"""An engine without a model: chunks are decoded into memory of someone else's, and the prompt is left to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from kvstream.codec.container import MAX_EXPANSION
from kvstream.codec.errors import CodecError
from kvstream.codec.targets import CacheTarget, KVTarget, as_target
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.codecs import CodecCache
from kvstream.testbed.engine.decoding import DecodingEngine
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import token_ids

if TYPE_CHECKING:
    import torch

Recompute: TypeAlias = Callable[[Sequence[int], int], None]
"""`recompute(token_ids, start)` puts the keys and values of a chunk's tokens in their place in the cache that is being
filled, from position `start` on. All tokens before are there. It is called on a thread of the session's and, for a GPU,
within a stream that is waited for."""
_CODECS: Final = CodecCache()
"""Of this process: a profile is read once."""


class CacheEngine(DecodingEngine):
    """An `Engine` for one context, whose cache goes to `target`."""

    def __init__(self, manifest: Manifest, target: CacheTarget, recompute: Recompute | None = None) -> None:
        """Raises SpecError where the target has another shape than the context's cache."""
        check_shape(manifest, target)
        super().__init__(target.device, codecs=_CODECS)
        self._manifest, self._into, self._recompute = manifest, target, recompute

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        if manifest != self._manifest:
            raise SpecError(f"context {manifest.context} has changed on the sender; fetch it again")
        self._take_in(manifest, self._codec_of(manifest), overlap=overlap)

    @property
    def target_kind(self) -> str:
        """Where values are written, as far as it decides what writing takes."""
        return type(self._into).__name__

    def _target(self, start: int, stop: int) -> KVTarget:
        return self._into.narrow(start, stop - start)

    def recompute(self, chunk: int, data: memoryview) -> Step:
        info = self.manifest.chunks[chunk]
        if self._recompute is None:
            raise CodecError(f"chunk {chunk} came as text, but there is nothing to compute its cache with")
        try:
            ids = token_ids(data, info.tokens)
        except SpecError as error:
            raise CodecError(f"text of chunk {chunk}: {error}") from error
        with self._model_runs() as start:
            self._recompute(ids, info.start)
        return self._step(start)

    def prefill(self, prompt_ids: Sequence[int]) -> Step:
        """The cache is complete."""
        now_s = time.monotonic()
        return Step(now_s, now_s)


def shape_of(manifest: Manifest) -> tuple[int, int, int, int, int]:
    """`[L, 2, T, H, D]` of a context's cache."""
    kv = manifest.kv
    return kv.layers, 2, manifest.tokens, kv.heads, kv.head_dim


def check_shape(manifest: Manifest, target: CacheTarget) -> None:
    if target.shape != shape_of(manifest):
        raise SpecError(
            f"context {manifest.context} has a cache [layers, 2, tokens, heads, head_dim] of {shape_of(manifest)}, the "
            f"target {target.shape}"
        )


def target_of(
    into: KVTarget | Callable[[Manifest], KVTarget] | None, manifest: Manifest, device: torch.device | str
) -> tuple[KVTarget, CacheTarget]:
    """Where a context's cache goes: what the caller gave or new memory, and the same as a target. Raises SpecError."""
    import torch

    from kvstream.codec.targets import DTYPES

    try:
        if into is None:
            shape = shape_of(manifest)
            for index, chunk in enumerate(manifest.chunks):
                if chunk.tokens * manifest.kv.elements_per_token > MAX_EXPANSION * min(chunk.sizes_bytes):
                    raise SpecError(f"chunk {index} claims a cache out of proportion to its bytes; store it again")
            if manifest.kv.dtype not in DTYPES:
                raise SpecError(f"its cache is {manifest.kv.dtype[:40]}, not one of {', '.join(DTYPES)}")
            kv: KVTarget = torch.empty(shape, dtype=DTYPES[manifest.kv.dtype], device=device)
        else:
            kv = into(manifest) if callable(into) else into
        return kv, as_target(kv)
    except (SpecError, CodecError) as error:
        raise SpecError(f"context {manifest.context}: {error}") from error
    except (RuntimeError, MemoryError, AssertionError) as error:  # torch asserts that it was built for CUDA
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise SpecError(f"context {manifest.context}: no memory for its cache ({why})") from error
