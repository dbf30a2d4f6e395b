"""`kvstream codec bench`: every level of every codec on one model: size, distortion, answers, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from codec.api import Codec
from testbed import calibrate, prepare
from testbed.llm import Model, Question, calculate_kv, score

CONTEXT = "docs"
REPEATS = 3


def measure(model: Model, codecs: Sequence[str], chunk_tokens: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a level: bits per element with everything but the profile counted, mean KL (nats) on held-out text,
    answers right, and elements a second of encoding and decoding one chunk (median of a few)."""
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
            bits = _bits(codec, exact, index, chunk_tokens)
            encode_s, decode_s = _speed(codec, exact[:, :, :chunk_tokens], index)
            elements = exact[:, :, :chunk_tokens].numel()
            rows.append(
                {
                    "codec": text,
                    "level": index,
                    "name": level.name,
                    "bits_per_element": bits,
                    "distortion": ladder[index],
                    "answers_right": _right(model, codec, exact, index, chunk_tokens, questions),
                    "answers": len(questions),
                    "encode_per_s": elements / encode_s,
                    "decode_per_s": elements / decode_s,
                }
            )
    return rows


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned table."""
    heads = f"{'codec':<10} {'level':<14} {'bit/element':>11} {'KL (nats)':>9} {'answers':>7}"
    lines = [f"{heads} {'encode':>9} {'decode':>9}"]
    for row in rows:
        answers = f"{row['answers_right']}/{row['answers']}"
        lines.append(
            f"{row['codec']:<10} {row['level']} {row['name']:<12} {row['bits_per_element']:>11.3f} "
            f"{row['distortion']:>9.2g} {answers:>7} "
            f"{row['encode_per_s'] / 1e6:>5.0f} M/s {row['decode_per_s'] / 1e6:>5.0f} M/s"
        )
    return "\n".join(lines)


def _bits(codec: Codec, kv: Tensor, level: int, chunk_tokens: int) -> float:
    total = 0
    for start in range(0, kv.shape[2], chunk_tokens):
        part = kv[:, :, start : start + chunk_tokens]
        total += len(codec.encode(part, level, positions=range(start, start + part.shape[2])))
    return total * 8 / kv.numel()


def _speed(codec: Codec, part: Tensor, level: int) -> tuple[float, float]:
    span = range(part.shape[2])
    data = codec.encode(part, level, positions=span)
    codec.decode(data)
    times: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        codec.encode(part, level, positions=span)
        middle = time.perf_counter()
        codec.decode(data)
        times.append((middle - start, time.perf_counter() - middle))
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def _right(
    model: Model, codec: Codec, exact: Tensor, level: int, chunk_tokens: int, questions: Sequence[Question]
) -> int:
    longest = max(len(q.prompt_ids) + len(q.answer_ids) for q in questions)
    cache = model.new_cache(exact.shape[2] + longest)
    cache.length = exact.shape[2]
    cache.view().copy_(calibrate.round_trip(codec, exact, level, chunk_tokens))
    return sum(score(model, cache, questions).right)
