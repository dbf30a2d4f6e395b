"""Rate and quality of the codecs on real models, and what each stage of the kvstream codec gains.

    python benchmarks/codec_rate.py [--model FOLDER ...] [--codecs NAME ...] [--contexts N] [--text NAME ...]
                                    [--no-ablation] [--device DEVICE] [--threads N] [--json FILE]

For every model, with caches in bfloat16: contexts of 1,024 tokens of held-out text with key-value lines are coded in
one chunk, everything but the profile counted; 128 tokens of text and a question about every line follow. Printed per
codec and level: bits per element, mean KL (nats) of the next-token distribution against the exact cache, correct
answers. Profiles were fitted on other text. `ratios` are how many times fewer bits kvstream takes than each level of
`artifact`, CacheGen's public code, and of the other codecs, at the same KL: its levels joined by a line in the
logarithms of both. With `--device cuda` the model runs there, in float32 as on the CPU, kvstream encodes there, and
kvtc's eigenvectors are found there; profiles that a model lacks are calibrated first.

`--text` names kinds of text: `check` is like the calibration's, `prose`, `language` and `random` are unlike it, `all`
is every kind; beside `check`, only the codecs that the comparison needs are run, unless `--codecs` names others. Every
(model, text) is kept with the command and machine of its run, and what the file has of others stays.

The ablation, on `check`, fits the codec with stages added one by one, then the whole codec with one part changed, on
half of the contexts. `times_bits` is how many times the bits of the whole codec a variant takes at the same KL, the
geometric mean over its levels that lie within the whole codec's; what the missing stages cost.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvstream.codec import kvtc, quantize, registry
from kvstream.codec.api import Codec
from kvstream.codec.kvstream import fit, fitting, kinds
from kvstream.codec.profile import Profile
from kvstream.testbed.encoding import calibrate, gradients
from kvstream.testbed.encoding.gradients import Sensitivity
from kvstream.testbed.engine.loading import bundled_model_path, load_model
from kvstream.testbed.engine.model import Model, calculate_kv, mean_kl
from kvstream.testbed.host import machine

SECOND = Path(__file__).parent / "models" / "second"
OUT = Path(__file__).parent / "results" / "codec-rate.json"
CONTEXT_TOKENS, TEXT_TOKENS = 1_024, 128
CODECS = ("uniform", "fp8", "kivi", "artifact", "cachegen", "kvtc", "kvstream")
UNLIKE = ("artifact", "kvtc", "kvstream")
"""Codecs that are run on text unlike the calibration's."""
TEXTS = {"check": "check", "prose": "check-prose", "language": "check-language", "random": "check-random"}
NEAR_BITS = 0.5
"""The level whose answers are compared with the exact cache's is the one nearest to it."""
ABLATION_BITS = (0.15, 0.4, 1.0)
EVERY = 2
"""The ablation takes every so many of the contexts."""
LINE = re.compile(r"(line [a-z]+-[a-z]+: REGISTER is <)(\d{5})>")


@dataclass(frozen=True)
class Case:
    """A context's exact cache, the tokens after it, the predictions over them, and where answers stand in those."""

    kv: Tensor
    suffix: tuple[int, ...]
    exact: Tensor
    answers: tuple[slice, ...]


def cases(model: Model, split: str, count: int) -> Iterator[Case]:
    """Contexts of the split, each followed by text and a question about every line in it."""
    for sample in calibrate.samples(model, split, count, context_tokens=CONTEXT_TOKENS):
        suffix = list(sample.suffix_ids[:TEXT_TOKENS])
        answers = []
        for prompt, answer in LINE.findall(model.decode(sample.context_ids)):
            asked = len(model.encode("\n" + prompt))
            both = model.encode("\n" + prompt + answer)
            suffix += both
            answers.append(slice(len(suffix) - len(both) + asked - 1, len(suffix) - 1))
        kv = calculate_kv(model, sample.context_ids).to(torch.bfloat16)
        yield Case(kv, tuple(suffix), calibrate.log_probs(model, kv.float(), suffix), tuple(answers))


def quality(model: Model, prepared: Sequence[Case], codec: Codec, level: int) -> dict[str, Any]:
    """Bits, KL and answers of one level."""
    coded_bytes = elements = right = asked = 0
    kls = []
    for case in prepared:
        data = codec.encode(case.kv, level, positions=range(case.kv.shape[2]))
        coded_bytes += len(data)
        elements += case.kv.numel()
        decoded = codec.decode(data, device=case.kv.device)
        seen = calibrate.log_probs(model, decoded.float(), case.suffix)
        kls.append(max(0.0, mean_kl(case.exact, seen)))
        best = seen.argmax(dim=-1).tolist()
        for where in case.answers:
            asked += 1
            right += best[where] == list(case.suffix[where.start + 1 : where.stop + 1])
    return {
        "bits": 8 * coded_bytes / elements,
        "kl": float(np.mean(kls)),
        "kl_by_context": kls,
        "right": right,
        "asked": asked,
    }


def cost(codec: Codec, case: Case) -> dict[str, float]:
    """Offline cost of one chunk at every level: CPU seconds to encode, and bytes to store over those in bfloat16."""
    positions = range(case.kv.shape[2])
    codec.encode(case.kv, 0, positions=positions)
    start = time.process_time()
    stored = sum(len(codec.encode(case.kv, level, positions=positions)) for level in range(len(codec.levels)))
    return {"encode_cpu_s": time.process_time() - start, "stored_over_bf16": stored / (2 * case.kv.numel())}


def exact_answers(prepared: Sequence[Case]) -> int:
    """How many questions the exact caches answer right."""
    return sum(
        case.exact[where].argmax(dim=-1).tolist() == list(case.suffix[where.start + 1 : where.stop + 1])
        for case in prepared
        for where in case.answers
    )


def principal_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    """`kvtc.principal`, on a device."""
    usual = kvtc.principal
    return lambda rows: usual(rows.to(device)).cpu()


def ladder(model: Model, prepared: Sequence[Case], names: Sequence[str] = CODECS) -> list[dict[str, Any]]:
    """Every level of some codecs."""
    rows: list[dict[str, Any]] = []
    for name in names:
        codec = calibrate.make_codec(name, model, print)
        offline = cost(codec, prepared[0])
        for level, about in enumerate(codec.levels):
            found = quality(model, prepared, codec, level)
            rows.append({"codec": name, "level": level, "name": about.name} | found | offline)
            print(line(rows[-1]), flush=True)
    return rows


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many times fewer bits kvstream takes at the KL of each level of the other codecs; none where its own levels
    do not reach it."""
    mine = [(r["bits"], r["kl"]) for r in rows if r["codec"] == "kvstream"]
    found = []
    for row in rows:
        ours = bits_at(mine, row["kl"])
        if row["codec"] != "kvstream" and ours is not None:
            entry = {"codec": row["codec"], "level": row["level"], "kl": row["kl"], "bits": row["bits"], "ours": ours}
            found.append(entry | {"times": row["bits"] / ours})
    return found


def bits_at(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Bits of a codec with these levels (bits, KL) at a KL, on a line in the logarithms; at the ends, those of the
    smallest level for a KL above it, None for one below the largest's."""
    points = sorted((max(loss, 1e-9), bits) for bits, loss in curve)
    if kl < points[0][0]:
        return None
    logs = np.log(np.array(points))
    return float(np.exp(np.interp(np.log(kl), logs[:, 0], logs[:, 1])))


@dataclass(frozen=True)
class Variant:
    """A way to build the kvstream codec: what `fit` is called with, and what is patched around it."""

    name: str
    settings: Mapping[str, Any]
    rate_weight: float = quantize.RATE_WEIGHT
    change_bits: float = kinds.CHANGE_BITS
    centroids: bool = True

    def build(self, kv: Sequence[Tensor]) -> Codec:
        """Fit and make the codec; to be used while its constants are patched."""
        profile = fit(kv, target_bits=ABLATION_BITS, **self.settings)
        if not self.centroids:
            symbols = np.arange(-quantize.HALF, quantize.HALF + 1, dtype=np.float32)
            whole = np.tile(symbols, (len(profile.tensors["values"]), 1))
            profile = Profile({**profile.tensors, "values": whole}, profile.metadata)
        return registry.make("kvstream", {}, profile)


def variants(cost: Sensitivity, mixed: Sensitivity, rope: Any) -> list[Variant]:
    """The stages one after another, then the whole codec with one part changed; `mixed` is the sensitivity with the
    sinks in it."""
    whole = {"rope": rope, "sensitivity": cost.metric, "sinks": cost.sinks}
    found = [
        Variant("channels as they are", {"klt": False}),
        Variant("+ steps by the sensitivity", {"klt": False, "sensitivity": mixed.metric}),
        Variant("+ keys turned back", {"klt": False, "sensitivity": mixed.metric, "rope": rope}),
        Variant("+ KLT over a layer's keys and values", {"sensitivity": mixed.metric, "rope": rope, "group": 1}),
    ]
    if cost.sinks:
        found.append(Variant("+ sinks apart", whole | {"group": 1}))
    return [
        *found,
        Variant("+ over layers: all", whole),
        Variant("all, but kinds as calibrated", whole, change_bits=1e4),
        Variant("all, but no dead zone", whole, rate_weight=1e-6),
        Variant("all, but no centroids", whole, centroids=False),
    ]


def ablation(model: Model, prepared: Sequence[Case], levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: its curve, and how many times the whole codec's bits it takes."""
    fitted = list(calibrate.samples(model, "fit", calibrate.FIT_SAMPLES))
    kv = [calculate_kv(model, sample.context_ids).to("cpu", torch.bfloat16) for sample in fitted]
    rope = calibrate.rope_of(model)
    some = calibrate.GRADIENT_SAMPLES
    suffixes = [sample.suffix_ids for sample in fitted[:some]]
    cost = gradients.sensitivity(model, kv[:some], suffixes, rope)
    with patched(gradients, count_sinks=lambda energies: 0):
        mixed = gradients.sensitivity(model, kv[:some], suffixes, rope)
    whole = [
        (row["bits"], float(np.mean(row["kl_by_context"][::EVERY]))) for row in levels if row["codec"] == "kvstream"
    ]
    rows: list[dict[str, Any]] = []
    for variant in variants(cost, mixed, rope):
        weights = patched(quantize, RATE_WEIGHT=variant.rate_weight)
        chosen = patched(kinds, RATE_WEIGHT=variant.rate_weight, CHANGE_BITS=variant.change_bits)
        with weights, chosen, patched(fitting, SAMPLE_TOKENS=1_000):
            codec = variant.build(kv)
            curve = [quality(model, prepared[::EVERY], codec, level) for level in range(len(ABLATION_BITS))]
        found = [row["bits"] / ours for row in curve if (ours := bits_at(whole, row["kl"])) is not None]
        times = float(np.exp(np.mean(np.log(found)))) if found else None
        rows.append({"variant": variant.name, "times_bits": times, "curve": curve})
        points = ", ".join(f"KL {row['kl']:.5f} at {row['bits']:.3f} bit" for row in curve)
        print(
            f"{variant.name:<38} {points}: " + (f"{times:.2f} times the bits" if times else "out of reach"), flush=True
        )
    return rows


@contextmanager
def patched(module: Any, **names: Any) -> Iterator[None]:
    """A module with other constants or functions for a while."""
    usual = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(usual)


def line(row: Mapping[str, Any]) -> str:
    answers = f"{row['right']}/{row['asked']}"
    return f"{row['codec']:<10} {row['name']:<14} {row['bits']:6.3f} bit  KL {row['kl']:.5f}  {answers}"


def summary(entry: Mapping[str, Any]) -> str:
    """What is asked of the codec on a kind of text, in a line."""
    artifact = next((r for r in entry["ratios"] if (r["codec"], r["level"]) == ("artifact", 1)), None)
    kvtc = min((r["times"] for r in entry["ratios"] if r["codec"] == "kvtc"), default=None)
    mine = [row for row in entry["levels"] if row["codec"] == "kvstream"]
    near = min(mine, key=lambda row: abs(row["bits"] - NEAR_BITS))
    times = f"{artifact['times']:.1f}x" if artifact else "out of reach"
    answers = f"{near['right']} answers of {entry['exact']}"
    least = f"kvtc {kvtc:.2f}x or more, " if kvtc else ""
    return f"artifact 1 {times}, {least}at {near['bits']:.2f} bit {answers}"


def measured(model: Model, text: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about a model on a kind of text, printed as it comes."""
    prepared = list(cases(model, TEXTS[text], options.contexts))
    with patched(kvtc, principal=principal_on(model.device)):
        rows = ladder(model, prepared, options.codecs or (CODECS if text == "check" else UNLIKE))
    entry: dict[str, Any] = {"levels": rows, "ratios": ratios(rows), "exact": exact_answers(prepared)}
    for found in entry["ratios"]:
        print(f"at the KL of {found['codec']} {found['level']}: {found['times']:.2f} times fewer bits", flush=True)
    print(f"{model.name}, {text}: {summary(entry)}", flush=True)
    if text == "check" and not options.no_ablation:
        entry["ablation"] = ablation(model, prepared, rows)
    return entry | {"command": "python " + " ".join(sys.argv), "machine": machine.describe()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", nargs="*", default=[str(bundled_model_path()), str(SECOND), "smollm2"])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=[])
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--text", nargs="+", default=["check"], choices=[*TEXTS, "all"], help="kinds of held-out text")
    parser.add_argument("--no-ablation", action="store_true", help="only the codecs as they are")
    parser.add_argument("--device", default="cpu", help="where the model runs, for instance cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    body = {"models": json.loads(options.json.read_text())["models"] if options.json.is_file() else {}}
    for source in options.model:
        model = load_model(source, device=options.device, dtype="float32")
        print(f"{model.name}: {model.kv}", flush=True)
        own = body["models"].setdefault(model.name, {"shape": [model.kv.layers, model.kv.heads, model.kv.head_dim]})
        for text in TEXTS if "all" in options.text else options.text:
            entry = measured(model, text, options)
            if text == "check":
                own |= entry
            else:
                own.setdefault("texts", {})[text] = entry
            own["profile_bytes"] = own.get("profile_bytes", {}) | {
                name: len(calibrate.profile_of(name, model).to_bytes())
                for name in dict.fromkeys(row["codec"] for row in entry["levels"])
                if registry.codec_class(name).needs_profile
            }
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(body, indent=1) + "\n")
    print(options.json)


if __name__ == "__main__":
    main()
