"""Rate and quality of the codecs on real models, and what each stage of the kvstream codec brings.

    python benchmarks/codec_rate.py [--model FOLDER ...] [--contexts N] [--threads N] [--skip-ablation] [--json FILE]

For the bundled model and a second one (another width, depth, theta and mix of training data), in bfloat16: contexts
of 2,048 tokens of held-out text with key-value lines are coded in chunks, everything but the profile counted; 256
tokens of text and a question about every line follow. Printed per codec and level: bits per element, all in and
payload alone, mean KL (nats) of the next-token distribution against the exact cache, answers right, and the size over
the entropy of the coder's own model. Profiles were fitted on other text. `ratio` is how many times smaller the
smallest kvstream level is that is at least as good (KL and answers) as level 1 of `artifact`, CacheGen's public code.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec import container, kvstream, quantize, registry
from codec.api import Codec
from codec.artifact import Artifact
from codec.profile import Profile
from testbed import calibrate, machine
from testbed.llm import Model, bundled_model_path, calculate_kv, mean_kl

SECOND = Path(__file__).parent / "models" / "second"
OUT = Path(__file__).parent / "results" / "codec-rate.json"
CONTEXT_TOKENS, TEXT_TOKENS = 2_048, 256
CHUNKS = (1_024, 256)
CODECS = ("uniform", "fp8", "artifact", "cachegen", "kvstream")
ABLATION_BITS = (0.8, 1.2, 1.8)
LINE = re.compile(rb"(line [a-z]+-[a-z]+: REGISTER is <)(\d{5})>")


@dataclass(frozen=True)
class Case:
    """A context's exact cache, the tokens after it, the predictions over them, and where answers stand in those."""

    kv: Tensor
    suffix: tuple[int, ...]
    exact: Tensor
    answers: tuple[slice, ...]


def cases(model: Model, count: int) -> Iterator[Case]:
    """Contexts of the check split, each followed by text and a question about every line in it."""
    for sample in calibrate.samples(model, "check", count, context_tokens=CONTEXT_TOKENS):
        suffix = bytes(sample.suffix_ids[:TEXT_TOKENS])
        answers = []
        for prompt, answer in LINE.findall(bytes(sample.context_ids)):
            suffix += b"\n" + prompt + answer
            answers.append(slice(len(suffix) - len(answer) - 1, len(suffix) - 1))
        kv = calculate_kv(model, sample.context_ids).to(torch.bfloat16)
        exact = calibrate.log_probs(model, kv.float(), tuple(suffix))
        yield Case(kv, tuple(suffix), exact, tuple(answers))


def quality(model: Model, prepared: Sequence[Case], codec: Codec, level: int, chunk_tokens: int) -> dict[str, Any]:
    """Bits, KL and answers of one level, all chunks coded at it."""
    total = payload = elements = right = asked = 0
    kl = text_kl = 0.0
    ideal = 0.0
    for case in prepared:
        coded = torch.empty_like(case.kv)
        for start in range(0, case.kv.shape[2], chunk_tokens):
            part = case.kv[:, :, start : start + chunk_tokens]
            data = codec.encode(part, level, positions=range(start, start + part.shape[2]))
            codec.decode(data, coded[:, :, start : start + chunk_tokens])
            total += len(data)
            payload += payload_bytes(container.parse(data))
            ideal += ideal_bits(codec, part, level, start) / 8
        elements += case.kv.numel()
        found = calibrate.log_probs(model, coded.float(), case.suffix)
        kl += mean_kl(case.exact, found) / len(prepared)
        text_kl += mean_kl(case.exact[:TEXT_TOKENS], found[:TEXT_TOKENS]) / len(prepared)
        best = found.argmax(dim=-1).tolist()
        for where in case.answers:
            asked += 1
            right += best[where] == list(case.suffix[where.start + 1 : where.stop + 1])
    row = {
        "bits": 8 * total / elements,
        "payload_bits": 8 * payload / elements,
        "kl": kl,
        "text_kl": text_kl,
        "right": right,
        "asked": asked,
    }
    return row | ({"over_entropy": total / ideal - 1} if ideal else {})


def payload_bytes(chunk: container.Chunk) -> int:
    """Bytes without what `artifact` ships beside its symbols and scales (tables, lengths) and without the header."""
    return sum(len(content) for tag, content in chunk.sections.items() if tag not in ("cdfs", "lens"))


def ideal_bits(codec: Codec, part: Tensor, level: int, start: int) -> float:
    """The entropy, under their own tables, of the symbols that the kvstream codec codes; 0 for other codecs."""
    if not isinstance(codec, kvstream.KVStream):
        return 0.0
    return codec.ideal_bits(part, level, positions=range(start, start + part.shape[2]))


def cost(codec: Codec, case: Case, chunk_tokens: int) -> dict[str, float]:
    """Offline cost of one chunk at every level: seconds to encode, and bytes to store over the size in bfloat16."""
    part = case.kv[:, :, :chunk_tokens]
    codec.encode(part, 0, positions=range(chunk_tokens))
    start = time.perf_counter()
    stored = sum(len(codec.encode(part, level, positions=range(chunk_tokens))) for level in range(len(codec.levels)))
    return {"encode_s": time.perf_counter() - start, "stored_over_bf16": stored / (2 * part.numel())}


def ladder(model: Model, prepared: Sequence[Case]) -> list[dict[str, Any]]:
    """Every codec, level and chunk size."""
    rows = []
    for name in CODECS:
        codec = calibrate.make_codec(name, model, print)
        for chunk_tokens in CHUNKS:
            offline = cost(codec, prepared[0], chunk_tokens)
            for level, about in enumerate(codec.levels):
                row = {"codec": name, "level": level, "name": about.name, "chunk_tokens": chunk_tokens}
                rows.append(row | quality(model, prepared, codec, level, chunk_tokens) | offline)
                print(line(rows[-1]), flush=True)
    return rows


def ratio(rows: Sequence[Mapping[str, Any]], chunk_tokens: int) -> dict[str, Any]:
    """The smallest kvstream level that is as good as level 1 of `artifact`, and how many times smaller it is."""
    mine = [r for r in rows if r["codec"] == "kvstream" and r["chunk_tokens"] == chunk_tokens]
    (theirs,) = [r for r in rows if (r["codec"], r["level"], r["chunk_tokens"]) == (Artifact.codec_id, 1, chunk_tokens)]
    good = [r for r in mine if r["kl"] <= theirs["kl"] and r["right"] >= theirs["right"]]
    if not good:
        return {"chunk_tokens": chunk_tokens, "level": None}
    best = min(good, key=lambda r: r["bits"])
    return {
        "chunk_tokens": chunk_tokens,
        "level": best["level"],
        "all_in": theirs["bits"] / best["bits"],
        "payload": theirs["payload_bits"] / best["bits"],
        "kl": best["kl"],
        "artifact_kl": theirs["kl"],
    }


def ablation(model: Model, prepared: Sequence[Case]) -> list[dict[str, Any]]:
    """The kvstream codec with its stages added one by one, each at the same three rates."""
    fitted = list(calibrate.samples(model, "fit", calibrate.FIT_SAMPLES))
    kv = [calculate_kv(model, sample.context_ids).to(torch.bfloat16) for sample in fitted]
    rope = calibrate.rope_of(model)
    metric = calibrate.sensitivity(model, fitted, rope)
    weights = metric.diagonal(dim1=3, dim2=4).mean(dim=3)
    stages: list[tuple[str, float, dict[str, Any]]] = [
        ("channels, one step", quantize.RATE_WEIGHT, {"rope": None, "centre": False, "klt": False}),
        ("+ means removed", quantize.RATE_WEIGHT, {"rope": None, "klt": False}),
        ("+ RoPE undone", quantize.RATE_WEIGHT, {"rope": rope, "klt": False}),
        ("+ KLT of each head", quantize.RATE_WEIGHT, {"rope": rope}),
        ("+ steps by head", quantize.RATE_WEIGHT, {"rope": rope, "sensitivity": weights}),
        ("+ metric in the head", quantize.RATE_WEIGHT, {"rope": rope, "sensitivity": metric}),
        ("the same, no dead zone", 0.0, {"rope": rope, "sensitivity": metric}),
    ]
    rows = []
    for name, rate_weight, settings in stages:
        with dead_zone(rate_weight):
            profile = kvstream.fit(kv, target_bits=ABLATION_BITS, **settings)
            codec = registry.make("kvstream", {}, Profile.from_bytes(profile.to_bytes()))
            for level in range(len(codec.levels)):
                row = {"codec": name, "level": level, "name": codec.levels[level].name, "chunk_tokens": CHUNKS[0]}
                rows.append(row | quality(model, prepared, codec, level, CHUNKS[0]))
                print(line(rows[-1]), flush=True)
    return rows


@contextmanager
def dead_zone(rate_weight: float) -> Iterator[None]:
    """Quantise with another weight of rate against error."""
    usual = quantize.RATE_WEIGHT
    quantize.RATE_WEIGHT = rate_weight
    try:
        yield
    finally:
        quantize.RATE_WEIGHT = usual


def delta_gain(prepared: Sequence[Case]) -> dict[str, float]:
    """Variance of the originals over that of differences to the group's anchor, median over channels: above 1 where
    CacheGen's differences pay."""
    kv = prepared[0].kv.float()
    found = {}
    for side, name in ((0, "keys"), (1, "values")):
        x = kv[:, side]
        anchor = x[:, ::10].repeat_interleave(10, dim=1)[:, : x.shape[1]]
        kept = torch.arange(x.shape[1]) % 10 != 0
        found[name] = float((x.var(dim=1) / (x - anchor)[:, kept].var(dim=1)).median())
    return found


def line(row: Mapping[str, Any]) -> str:
    extra = f"  {row['over_entropy']:+.1%} over entropy" if "over_entropy" in row else ""
    return (
        f"{row['codec']:<24} {row['name']:<14} {row['chunk_tokens']:>5} tokens  {row['bits']:6.3f} bit "
        f"({row['payload_bits']:.3f})  KL {row['kl']:.5f} (text {row['text_kl']:.5f})  "
        f"{row['right']}/{row['asked']}{extra}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, nargs="*", default=[bundled_model_path(), SECOND])
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-ablation", action="store_true")
    parser.add_argument("--json", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    np.seterr(all="raise", under="ignore")
    body: dict[str, Any] = {
        "command": f"python benchmarks/codec_rate.py --contexts {options.contexts}",
        "machine": machine.describe(),
        "models": {},
    }
    for folder in options.model:
        model = Model.load(folder)
        print(f"{model.name}: {model.kv}", flush=True)
        prepared = list(cases(model, options.contexts))
        rows = ladder(model, prepared)
        ratios = [ratio(rows, chunk_tokens) for chunk_tokens in CHUNKS]
        for entry in ratios:
            print("as good as artifact level 1:", json.dumps(entry))
        profiles = {name: len(calibrate.profile_of(name, model).to_bytes()) for name in ("cachegen", "kvstream")}
        body["models"][model.name] = {
            "shape": [model.kv.layers, model.kv.heads, model.kv.head_dim],
            "levels": rows,
            "ratio": ratios,
            "profile_bytes": profiles,
            "variance_over_deltas": delta_gain(prepared),
            "ablation": [] if options.skip_ablation else ablation(model, prepared),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    print(options.json)


if __name__ == "__main__":
    main()
