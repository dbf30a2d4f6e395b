"""`kvstream codec bench`: every level of every codec on one model: size, distortion, answers, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.testbed.encoding import calibrate, exam
from kvstream.testbed.encoding.tracking import Say, Track, untracked
from kvstream.testbed.engine.model import Model, calculate_kv
from kvstream.testbed.store import shift
from kvstream.testbed.workloads.contexts import ENGLISH_CONTEXTS, find_contexts, load_contexts

CONTEXT = "docs"
KINDS = {"lines": "key-value lines", "english": "English prose"}
"""Of contexts with questions: the key in a row, and the heading."""
REPEATS = 3
TORCHAC_COLUMNS = 64


def measure(
    model: Model, codecs: Sequence[str], chunk_tokens: int, say: Say,
    track: Track = untracked, text: str = "check",
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per level: bits per element (all but the profile) and of the payload alone, on a context of the text, and
    how far that lies from the codec's calibration (`shift`, None where the codec does not say);
    mean KL (nats) on its text; bytes of the profile; elements per second of encoding and decoding one chunk on the
    model's device (median of REPEATS); and of either kind of contexts with questions bits, KL and right answers.

    `lines` are key-value lines, `english` is prose; None where the model does not answer from its exact cache. Raises
    SpecError for an unknown text.
    """
    say("computing the exact caches of the contexts with questions")
    first = next(calibrate.samples(model, text, 1))
    exact = calculate_kv(model, first.context_ids)
    exams = {
        "lines": exam.prepare(model, find_contexts([CONTEXT])),
        "english": exam.prepare(model, load_contexts(ENGLISH_CONTEXTS)),
    }
    rows = []
    for spec in codecs:
        codec = calibrate.make_codec(spec, model, say, track)
        ladder = calibrate.distortions(model, codec, chunk_tokens, say, track, text)
        for index, level in enumerate(track(codec.levels, f"speed and answers of {spec}")):
            _, sizes = exam.through(codec, exact, index, chunk_tokens)
            part = exact[:, :, :chunk_tokens]
            encode_s, decode_s = _speed(codec, part, index)
            results = {kind: exam.sit(model, codec, index, chunk_tokens, own) for kind, own in exams.items()}
            rows.append(
                {
                    "codec": spec,
                    "level": index,
                    "name": level.name,
                    "text": text,
                    "bits_per_element": 8 * sizes.total / exact.numel(),
                    "payload_bits_per_element": 8 * sizes.payload / exact.numel(),
                    "profile_bytes": 0 if codec.profile is None else len(codec.profile.to_bytes()),
                    "cache_dtype": str(exact.dtype).removeprefix("torch."),
                    "shift": (found := shift.of_chunks(sizes.shifts)) and asdict(found),
                    "distortion": ladder[index],
                    "encode_per_s": part.numel() / encode_s,
                    "decode_per_s": part.numel() / decode_s,
                    **{kind: result and asdict(result) for kind, result in results.items()},
                }
            )
    return rows


def torchac(model: Model, chunk_tokens: int) -> dict[str, float] | None:
    """Symbols per second on one core of torchac, the coder of CacheGen's public code, without a quantiser. None if
    not installed."""
    from kvstream.codec.cachegen import columns_first
    from kvstream.codec.entropy import arithmetic, torchac_reference
    from kvstream.codec.entropy.tables import column_counts
    from kvstream.codec.uniform import quantise

    (context,) = find_contexts([CONTEXT])
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
    """The rows as an aligned table; below it torchac's speed, the profiles, and a note on scales."""
    about = "".join(f"   {title:<22}" for title in KINDS.values())
    lines = [
        f"{'':<25} {rows[0]['text'] if rows else '':<29}{about}",
        f"{'codec':<10} {'level':<14} {'bit/element':>11} {'payload':>7} {'KL (nats)':>9}"
        + "   bit/el.       KL answers" * len(KINDS)
        + f" {'encode':>9} {'decode':>9}",
    ]
    for row in rows:
        cells = "".join(f"   {_exam_cells(row[kind])}" for kind in KINDS)
        lines.append(
            f"{row['codec']:<10} {row['level']} {row['name']:<12} {row['bits_per_element']:>11.3f} "
            f"{row['payload_bits_per_element']:>7.3f} {row['distortion']:>9.2g}{cells} "
            f"{row['encode_per_s'] / 1e6:>5.0f} M/s {row['decode_per_s'] / 1e6:>5.0f} M/s"
        )
    speeds = f"{torchac['encode_per_s'] / 1e6:>5.0f} M/s {torchac['decode_per_s'] / 1e6:>5.0f} M/s" if torchac else ""
    lines.append(f"{'torchac':<10} {'the coder alone, on one core':<94} {speeds or 'not installed'}")
    profiles = {row["codec"]: f"{row['codec']} {row['profile_bytes']:,} bytes" for row in rows if row["profile_bytes"]}
    if profiles:
        lines.append(f"profiles, sent once and not included in rates: {', '.join(profiles.values())}")
    lines += [f"{codec} on {rows[0]['text']}: {found}" for codec, found in _shifts(rows).items()]
    if any(row["cache_dtype"] == "float32" for row in rows):
        lines.append(
            "the cache is float32, and so are the scales of uniform, artifact and cachegen: bfloat16 halves them"
        )
    return "\n".join(lines)


def _shifts(rows: Sequence[dict[str, Any]]) -> dict[str, shift.ShiftInfo | None]:
    """[codec]: how far the text lies from its calibration, over its levels."""
    known: dict[str, list[shift.ShiftInfo]] = {}
    for row in rows:
        if row["shift"] is not None:
            known.setdefault(row["codec"], []).append(shift.ShiftInfo(**row["shift"]))
    return {codec: shift.of_levels(levels) for codec, levels in known.items()}


def _exam_cells(result: dict[str, Any] | None) -> str:
    if result is None:
        return f"{'-':>7} {'-':>8} {'-':>7}"
    answers = f"{result['right']}/{result['asked']}"
    return f"{result['bits_per_element']:>7.3f} {result['kl']:>8.2g} {answers:>7}"


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
