"""Encoding a context into a store: its chunks at every level, and the data of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstream.policies.api import TEXT
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store import shift
from kvstream.testbed.store.api import ContextStore, Draft, chunk_id
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.testbed.store.shift import ShiftInfo
from kvstream.testbed.store.store import text_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from kvstream.codec.api import Codec, Shift
    from kvstream.testbed.engine.model import Model
    from kvstream.testbed.store.questions import Question


def store_kv(
    store: ContextStore,
    context: str,
    token_ids: Sequence[int],
    model: Model,
    codec: Codec,
    *,
    chunk_tokens: int,
    distortions: Sequence[float],
    measured_on: str | None = None,
    kv: Tensor | None = None,
    questions: Sequence[Question] | None = None,
    passage: Sequence[int] = (),
    force: bool = False,
) -> dict[int, str]:
    """Encode a context at every level and store it: `{chunk: id}` (the paper's API).

    `distortions[level]` (nats) goes into the manifest; `kvstream.testbed.encoding.calibrate` measures it, on a kind of
    text named `measured_on`. `kv` `[L, 2, T, H, D]` is the exact cache, computed if not given. With questions, they and
    the passage are scored over it and stored for the evaluation. The context is seen once all of it is written. Raises
    CodecError for a codec whose profile was calibrated for another model, unless `force`.
    """
    from kvstream.testbed.engine.model import calculate_kv

    if not token_ids:
        raise SpecError("a context needs at least one token")
    check_model(codec, model.fingerprint, force)
    exact = calculate_kv(model, token_ids) if kv is None else kv

    def evaluate(draft: Draft) -> None:
        if questions is not None:
            _put_evaluation(draft, model, exact, questions, passage)

    return _store(
        store,
        context,
        token_ids,
        exact,
        codec,
        model.fingerprint,
        model.vocabulary,
        chunk_tokens,
        distortions,
        evaluate,
        measured_on,
    )


def store_cache(
    store: ContextStore,
    context: str,
    token_ids: Sequence[int],
    kv: Tensor,
    codec: Codec,
    *,
    model: str,
    vocabulary: int,
    chunk_tokens: int,
    distortions: Sequence[float],
    measured_on: str | None = None,
    force: bool = False,
) -> dict[int, str]:
    """As `store_kv`, for a cache `[L, 2, T, H, D]` of a model of which only the fingerprint is known. Every token id is
    below `vocabulary`."""
    check_model(codec, model, force)
    return _store(
        store, context, token_ids, kv, codec, model, vocabulary, chunk_tokens, distortions, lambda draft: None,
        measured_on,
    )  # fmt: skip


def check_model(codec: Codec, fingerprint: str, force: bool) -> None:
    """Raises CodecError for a codec whose profile was calibrated for another model, unless `force`."""
    profile = getattr(codec, "profile", None)
    if profile is not None and not force:
        profile.check_model(fingerprint)


def _store(
    store: ContextStore, context: str, token_ids: Sequence[int], kv: Tensor, codec: Codec, model: str, vocabulary: int,
    chunk_tokens: int, distortions: Sequence[float], evaluate: Callable[[Draft], None], measured_on: str | None,
) -> dict[int, str]:  # fmt: skip
    """`evaluate` adds to the draft what only the evaluation reads."""
    if len(distortions) != len(codec.levels):
        raise SpecError(f"{len(distortions)} distortions given for {len(codec.levels)} levels")
    if chunk_tokens < 1 or not token_ids:
        raise SpecError("a context needs at least one token and chunks of at least one token")
    if kv.shape[2] != len(token_ids):
        raise SpecError(f"the cache has {kv.shape[2]} tokens, the context {len(token_ids)}")
    layers, _, _, heads, head_dim = kv.shape
    shape = KVShape(layers, heads, head_dim, str(kv.dtype).removeprefix("torch."))
    with store.draft(context) as draft:
        chunks, found = _put_chunks(draft, token_ids, vocabulary, codec, kv, chunk_tokens)
        evaluate(draft)
        profile = getattr(codec, "profile", None)
        manifest = Manifest(
            context=context,
            model=model,
            codec=codec.get_config(),
            profile=None if profile is None else store.put_profile(profile.to_bytes()),
            kv=shape,
            levels=tuple(
                LevelInfo(
                    name=level.name,
                    distortion=float(distortion),
                    bits_per_element=sum(c.sizes_bytes[i] for c in chunks)
                    * 8
                    / (len(token_ids) * shape.elements_per_token),
                )
                for i, (level, distortion) in enumerate(zip(codec.levels, distortions, strict=True))
            ),
            chunks=tuple(chunks),
            shift=found,
            measured_on=measured_on,
        )
        draft.publish(manifest)
    return {index: chunk_id(context, index) for index in range(len(chunks))}


def _put_chunks(
    draft: Draft, token_ids: Sequence[int], vocabulary: int, codec: Codec, exact: Tensor, chunk_tokens: int
) -> tuple[list[ChunkInfo], ShiftInfo | None]:
    """Write every chunk at every level and as text; and how far they lie from the codec's calibration."""
    chunks: list[ChunkInfo] = []
    shifts: list[list[Shift]] = [[] for _ in codec.levels]
    for index, start in enumerate(range(0, len(token_ids), chunk_tokens)):
        span = range(start, min(start + chunk_tokens, len(token_ids)))
        text = text_bytes(token_ids[span.start : span.stop], vocabulary)
        draft.put_chunk(index, TEXT, text)
        sizes: list[int] = []
        for level in range(len(codec.levels)):
            data = codec.encode(exact[:, :, span.start : span.stop], level, positions=span)
            draft.put_chunk(index, level, data)
            sizes.append(len(data))
            if (found := codec.shift(data)) is not None:
                shifts[level].append(found)
        chunks.append(ChunkInfo(span.start, span.stop, tuple(sizes), len(text)))
    return chunks, shift.of_levels(map(shift.of_chunks, shifts))


def _put_evaluation(
    draft: Draft, model: Model, kv: Tensor, questions: Sequence[Question], passage: Sequence[int]
) -> None:
    """Score the passage and the questions over the exact cache: the reference for all levels."""
    from kvstream.testbed.engine.model import SIDE_BY_SIDE_TOKENS, score

    longest = max((len(q.prompt_ids) + len(q.answer_ids) for q in questions), default=0)
    longest = max(longest, len(passage))
    cache = model.new_cache(kv.shape[2] + max(longest, SIDE_BY_SIDE_TOKENS))
    cache.length = kv.shape[2]
    cache.view().copy_(kv)
    result = score(model, cache, questions, passage)
    draft.put_evaluation(questions, passage, result.log_probs, sum(result.right))
