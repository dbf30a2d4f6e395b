"""Rate and quality of the codecs on real models, and what each stage of the kvstream codec brings.

    python benchmarks/codec_rate.py [--model FOLDER ...] [--contexts N] [--threads N] [--json FILE]

For the bundled model and a second one (another width, depth, theta and mix of training data), in bfloat16: contexts
of 2,048 tokens of held-out text with key-value lines are coded in chunks, everything but the profile counted; 256
tokens of text and a question about every line follow. Printed per codec and level: bits per element, all in and
payload alone, mean KL (nats) of the next-token distribution against the exact cache, answers right, and the size over
the entropy of the coder's own model. Profiles were fitted on other text. `ratio` is how many times smaller the
smallest kvstream level is that is at least as good (KL and answers) as level 1 of `artifact`, CacheGen's public code.

The ablation fits the codec with stages added one by one, then the whole codec with one part changed, each at two rates
on half of the contexts. `times_bits` is how many times the bits of the whole codec a variant takes at the same KL, the
geometric mean over the rates at which the whole codec has a level on either side; what the missing stages cost. The
row of the whole codec itself, fitted to fewer tokens, says how exact that is. A full run takes 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from codec import container, kvstream, quantize, registry
from codec.api import Codec
from codec.artifact import Artifact
from codec.profile import Profile
from testbed import calibrate, machine
from testbed.codec_bench import payload_bytes
from testbed.llm import Model, bundled_model_path, calculate_kv, mean_kl

SECOND = Path(__file__).parent / "models" / "second"
OUT = Path(__file__).parent / "results" / "codec-rate.json"
CONTEXT_TOKENS, TEXT_TOKENS = 2_048, 256
CHUNKS: Mapping[str, tuple[int, ...]] = {
    "uniform": (1_024,), "fp8": (1_024,), "artifact": (1_024, 256), "cachegen": (1_024,), "kvstream": (1_024, 256),
}  # fmt: skip
ABLATION_BITS = (0.9, 1.5)
ABLATION_SAMPLE_TOKENS = 1_000
"""A third of what calibration fits tables to, for every variant alike."""
EVERY = 2
"""The ablation takes every so many of the contexts."""
SINKS = 4
"""First tokens of a context, which much attention falls on."""
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


def rate(
    prepared: Sequence[Case], codec: Codec, level: int, chunk_tokens: int, decoded: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """Bits per element of one level, all chunks coded at it; the caches that come back go into `decoded`."""
    total = payload = elements = 0
    ideal = 0.0
    for index, case in enumerate(prepared):
        for start in range(0, case.kv.shape[2], chunk_tokens):
            part = case.kv[:, :, start : start + chunk_tokens]
            data = codec.encode(part, level, positions=range(start, start + part.shape[2]))
            if decoded is not None:
                codec.decode(data, decoded[index][:, :, start : start + chunk_tokens])
            total += len(data)
            payload += payload_bytes(container.parse(data))
            ideal += ideal_bits(codec, part, level, start) / 8
        elements += case.kv.numel()
    found = {"bits": 8 * total / elements, "payload_bits": 8 * payload / elements}
    return found | ({"over_entropy": total / ideal - 1} if ideal else {})


def quality(
    model: Model, prepared: Sequence[Case], codec: Codec, level: int, chunk_tokens: int, exact_tokens: int = 0
) -> dict[str, Any]:
    """Bits, KL and answers of one level, all chunks coded at it. The first `exact_tokens` of a context may be kept as
    they are beside that, in 16 bit."""
    decoded = [torch.empty_like(case.kv) for case in prepared]
    found = rate(prepared, codec, level, chunk_tokens, decoded)
    found["bits"] += 16 * exact_tokens / prepared[0].kv.shape[2]
    right = asked = 0
    kls, text_kls = [], []
    for case, coded in zip(prepared, decoded, strict=True):
        coded[:, :, :exact_tokens] = case.kv[:, :, :exact_tokens]
        seen = calibrate.log_probs(model, coded.float(), case.suffix)
        kls.append(mean_kl(case.exact, seen))
        text_kls.append(mean_kl(case.exact[:TEXT_TOKENS], seen[:TEXT_TOKENS]))
        best = seen.argmax(dim=-1).tolist()
        for where in case.answers:
            asked += 1
            right += best[where] == list(case.suffix[where.start + 1 : where.stop + 1])
    return found | {
        "kl": float(np.mean(kls)),
        "kl_by_context": kls,
        "text_kl": float(np.mean(text_kls)),
        "right": right,
        "asked": asked,
    }


def ideal_bits(codec: Codec, part: Tensor, level: int, start: int) -> float:
    """The entropy, under their own tables, of the symbols that the kvstream codec codes; 0 for other codecs."""
    if not isinstance(codec, kvstream.KVStream):
        return 0.0
    return codec.ideal_bits(part, level, positions=range(start, start + part.shape[2]))


def cost(codec: Codec, case: Case, chunk_tokens: int) -> dict[str, float]:
    """Offline cost of one chunk at every level: CPU seconds to encode, and bytes to store over those in bfloat16."""
    part = case.kv[:, :, :chunk_tokens]
    codec.encode(part, 0, positions=range(chunk_tokens))
    start = time.process_time()
    stored = sum(len(codec.encode(part, level, positions=range(chunk_tokens))) for level in range(len(codec.levels)))
    return {"encode_cpu_s": time.process_time() - start, "stored_over_bf16": stored / (2 * part.numel())}


def ladder(model: Model, prepared: Sequence[Case]) -> list[dict[str, Any]]:
    """Every codec, level and chunk size. How a token comes back does not depend on the chunk it is in, so quality is
    measured at the first size only."""
    rows: list[dict[str, Any]] = []
    for name, chunk_sizes in CHUNKS.items():
        codec = calibrate.make_codec(name, model, print)
        for chunk_tokens in chunk_sizes:
            offline = cost(codec, prepared[0], chunk_tokens)
            for level, about in enumerate(codec.levels):
                row = {"codec": name, "level": level, "name": about.name, "chunk_tokens": chunk_tokens}
                if chunk_tokens == chunk_sizes[0]:
                    found = quality(model, prepared, codec, level, chunk_tokens)
                else:
                    (same,) = (r for r in rows if (r["codec"], r["level"], r["chunk_tokens"]) == (name, level, 1_024))
                    found = same | rate(prepared, codec, level, chunk_tokens)
                rows.append(found | row | offline)
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


@dataclass(frozen=True)
class Variant:
    """A way to build the kvstream codec: what `kvstream.fit` is told, and what is changed around it."""

    name: str
    settings: Mapping[str, Any]
    rate_weight: float = quantize.RATE_WEIGHT
    classes: int = 32
    centroids: bool = True
    exact_tokens: int = 0

    def build(self, kv: Sequence[Tensor]) -> Codec:
        """Fit and make the codec; to be used within `patched`, since its quantiser depends on the rate's weight."""
        with patched(kvstream, design=partial(quantize.design, n_classes=self.classes)):
            profile = kvstream.fit(kv, target_bits=ABLATION_BITS, **self.settings)
        if not self.centroids:
            symbols = np.arange(-quantize.HALF, quantize.HALF + 1, dtype=np.float32)
            whole = np.tile(symbols, (len(profile.tensors["values"]), 1))
            profile = Profile({**profile.tensors, "values": whole}, profile.metadata)
        return registry.make("kvstream", {}, profile)


def variants(model: Model, fitted: Sequence[calibrate.Sample]) -> list[Variant]:
    """The stages one after another, then the whole codec with one part changed."""
    rope = calibrate.rope_of(model)
    metric = calibrate.sensitivity(model, fitted, rope)
    weights = metric.diagonal(dim1=3, dim2=4).mean(dim=3)
    whole = {"rope": rope, "sensitivity": metric}
    return [
        Variant("channels, one step", {"centre": False, "klt": False}),
        Variant("+ means removed", {"klt": False}),
        Variant("+ RoPE undone", {"rope": rope, "klt": False}),
        Variant("+ KLT of each head", {"rope": rope}),
        Variant("+ steps by head", {"rope": rope, "sensitivity": weights}),
        Variant("+ metric in the head: all", whole),
        Variant("all, but no dead zone", whole, rate_weight=0.0),
        Variant("all, but no centroids", whole, centroids=False),
        Variant("all, but means kept", whole | {"centre": False}),
        Variant("all, 8 table classes", whole, classes=8),
        Variant(f"all, first {SINKS} tokens exact", whole, exact_tokens=SINKS),
    ]


def ablation(model: Model, prepared: Sequence[Case], ladder: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: its curve, and how many times the whole codec's bits it takes."""
    fitted = list(calibrate.samples(model, "fit", calibrate.FIT_SAMPLES))
    kv = [calculate_kv(model, sample.context_ids).to(torch.bfloat16) for sample in fitted]
    rows: list[dict[str, Any]] = []
    whole = [
        (row["bits"], float(np.mean(row["kl_by_context"][::EVERY])))
        for row in ladder
        if row["codec"] == "kvstream" and row["chunk_tokens"] == 1_024
    ]
    for variant in variants(model, fitted):
        small = patched(kvstream, _SAMPLE_TOKENS=ABLATION_SAMPLE_TOKENS)
        with patched(quantize, RATE_WEIGHT=variant.rate_weight), small:
            codec = variant.build(kv)
            curve = [
                quality(model, prepared[::EVERY], codec, level, 1_024, variant.exact_tokens)
                for level in range(len(codec.levels))
            ]
        times = times_bits(whole, [(row["bits"], row["kl"]) for row in curve])
        rows.append({"variant": variant.name, "times_bits": times, "curve": curve})
        points = ", ".join(f"KL {row['kl']:.5f} at {row['bits']:.3f} bit" for row in curve)
        print(
            f"{variant.name:<28} {points}: " + (f"{times:.2f} times the bits" if times else "out of reach"), flush=True
        )
    return rows


def times_bits(whole: Sequence[tuple[float, float]], curve: Sequence[tuple[float, float]]) -> float | None:
    """Bits of a curve of (bits, KL) over those at which the whole codec has the same KL, its levels joined by a smooth
    line in log KL; None if it has none of them."""
    by_kl = sorted((np.log(kl), bits) for bits, kl in whole)
    bits_at = PchipInterpolator(*zip(*by_kl, strict=True), extrapolate=False)
    found = [float(bits / bits_at(np.log(kl))) for bits, kl in curve]
    inside = [times for times in found if not np.isnan(times)]
    return float(np.exp(np.mean(np.log(inside)))) if inside else None


@contextmanager
def patched(module: Any, **names: Any) -> Iterator[None]:
    """A module with other constants or functions for a while."""
    usual = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(usual)


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
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    np.seterr(all="raise", under="ignore")
    body: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": machine.describe(),
        "models": {},
    }
    for folder in options.model:
        model = Model.load(folder)
        print(f"{model.name}: {model.kv}", flush=True)
        prepared = list(cases(model, options.contexts))
        rows = ladder(model, prepared)
        ratios = [ratio(rows, chunk_tokens) for chunk_tokens in CHUNKS["kvstream"]]
        for entry in ratios:
            print("as good as artifact level 1:", json.dumps(entry))
        profiles = {name: len(calibrate.profile_of(name, model).to_bytes()) for name in ("cachegen", "kvstream")}
        body["models"][model.name] = {
            "shape": [model.kv.layers, model.kv.heads, model.kv.head_dim],
            "levels": rows,
            "ratio": ratios,
            "profile_bytes": profiles,
            "variance_over_deltas": delta_gain(prepared),
            "ablation": ablation(model, prepared, rows),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    print(options.json)


if __name__ == "__main__":
    main()
