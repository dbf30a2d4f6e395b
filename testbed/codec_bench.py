"""`kvstream codec bench`: every level of every codec on one model: size, distortion, answers, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.api import Codec
from codec.container import Chunk, parse
from codec.errors import CodecError
from testbed import calibrate, prepare
from testbed.llm import Model, Question, calculate_kv, score

CONTEXT = "docs"
REPEATS = 3
TORCHAC_COLUMNS = 64


def measure(model: Model, codecs: Sequence[str], chunk_tokens: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a level: bits per element with everything but the profile counted, and of the payload alone, bytes of the
    profile, mean KL (nats) on held-out text, answers right, and elements a second of encoding and decoding one chunk on
    the model's device (median of a few)."""
    (context,) = prepare.find_contexts([CONTEXT])
    tokens = model.encode(context.text.decode())
    exact = calculate_kv(model, tokens)
    questions = [
        Question(tuple(model.encode(q.prompt.decode())), tuple(model.encode(q.answer.decode())))
        for q in prepare.asked(context.questions)
    ]
    rows = []
    for text in codecs:
        codec = calibrate.make_codec(text, model, say)
        ladder = calibrate.distortions(model, codec, chunk_tokens, say)
        for index, level in enumerate(codec.levels):
            bits, payload = _bits(codec, exact, index, chunk_tokens)
            encode_s, decode_s = _speed(codec, exact[:, :, :chunk_tokens], index)
            elements = exact[:, :, :chunk_tokens].numel()
            rows.append(
                {
                    "codec": text,
                    "level": index,
                    "name": level.name,
                    "bits_per_element": bits,
                    "payload_bits_per_element": payload,
                    "profile_bytes": 0 if codec.profile is None else len(codec.profile.to_bytes()),
                    "cache_dtype": str(exact.dtype).removeprefix("torch."),
                    "distortion": ladder[index],
                    "answers_right": _right(model, codec, exact, index, chunk_tokens, questions),
                    "answers": len(questions),
                    "encode_per_s": elements / encode_s,
                    "decode_per_s": elements / decode_s,
                }
            )
    return rows


def torchac(model: Model, chunk_tokens: int) -> dict[str, float] | None:
    """Symbols a second on one core of torchac, the coder of CacheGen's public code, alone: no quantiser beside it. None
    if it is not installed."""
    from codec.cachegen import columns_first
    from codec.entropy import arithmetic, torchac_reference
    from codec.entropy.tables import column_counts
    from codec.uniform import quantise

    (context,) = prepare.find_contexts([CONTEXT])
    rows = calculate_kv(model, model.encode(context.text.decode())[:chunk_tokens]).flatten(3).cpu()
    symbols = columns_first(quantise(rows, rows.abs().amax(dim=3), 15))[:TORCHAC_COLUMNS]
    cdfs = arithmetic.from_counts(column_counts(symbols, 32))
    own = np.arange(len(symbols))
    try:
        streams = torchac_reference.encode_streams(symbols, own, cdfs)
    except CodecError:
        return None
    times = {
        "encode_per_s": _median_s(lambda: torchac_reference.encode_streams(symbols, own, cdfs)),
        "decode_per_s": _median_s(lambda: torchac_reference.decode_streams(streams, own, cdfs, symbols.shape[1])),
    }
    return {name: symbols.size / seconds for name, seconds in times.items()}


def text(rows: Sequence[dict[str, Any]], torchac: dict[str, float] | None) -> str:
    """The rows as an aligned table; below it torchac's speed, profiles, and what is to be known of the scales."""
    heads = f"{'codec':<10} {'level':<14} {'bit/element':>11} {'payload':>7} {'KL (nats)':>9} {'answers':>7}"
    lines = [f"{heads} {'encode':>9} {'decode':>9}"]
    for row in rows:
        answers = f"{row['answers_right']}/{row['answers']}"
        lines.append(
            f"{row['codec']:<10} {row['level']} {row['name']:<12} {row['bits_per_element']:>11.3f} "
            f"{row['payload_bits_per_element']:>7.3f} {row['distortion']:>9.2g} {answers:>7} "
            f"{row['encode_per_s'] / 1e6:>5.0f} M/s {row['decode_per_s'] / 1e6:>5.0f} M/s"
        )
    speeds = f"{torchac['encode_per_s'] / 1e6:>5.0f} M/s {torchac['decode_per_s'] / 1e6:>5.0f} M/s" if torchac else ""
    lines.append(f"{'torchac':<10} {'the coder alone, on one core':<54} {speeds or 'not installed'}")
    profiles = {row["codec"]: f"{row['codec']} {row['profile_bytes']:,} bytes" for row in rows if row["profile_bytes"]}
    if profiles:
        lines.append(f"profiles, which travel once and are in no rate: {', '.join(profiles.values())}")
    if any(row["cache_dtype"] == "float32" for row in rows):
        lines.append(
            "the cache is float32, and so are the scales of uniform, artifact and cachegen: bfloat16 halves them"
        )
    return "\n".join(lines)


def payload_bytes(chunk: Chunk) -> int:
    """Bytes without what `artifact` ships beside its symbols and scales (tables, lengths) and without the header."""
    return sum(len(content) for tag, content in chunk.sections.items() if tag not in ("cdfs", "lens"))


def _bits(codec: Codec, kv: Tensor, level: int, chunk_tokens: int) -> tuple[float, float]:
    """Bits per element of all chunks, and of their payloads."""
    total = payload = 0
    for start in range(0, kv.shape[2], chunk_tokens):
        part = kv[:, :, start : start + chunk_tokens]
        data = codec.encode(part, level, positions=range(start, start + part.shape[2]))
        total += len(data)
        payload += payload_bytes(parse(data))
    return total * 8 / kv.numel(), payload * 8 / kv.numel()


def _speed(codec: Codec, part: Tensor, level: int) -> tuple[float, float]:
    span = range(part.shape[2])
    data = codec.encode(part, level, positions=span)

    def decode() -> None:
        codec.decode(data, device=part.device)
        if part.is_cuda:
            torch.cuda.synchronize(part.device)

    decode()
    return _median_s(lambda: codec.encode(part, level, positions=span)), _median_s(decode)


def _median_s(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _right(
    model: Model, codec: Codec, exact: Tensor, level: int, chunk_tokens: int, questions: Sequence[Question]
) -> int:
    longest = max(len(q.prompt_ids) + len(q.answer_ids) for q in questions)
    cache = model.new_cache(exact.shape[2] + longest)
    cache.length = exact.shape[2]
    cache.view().copy_(calibrate.round_trip(codec, exact, level, chunk_tokens))
    return sum(score(model, cache, questions).right)
