"""Rate and distortion of the codecs' levels on the bundled model: testbed/workloads/data/ladders.json.

    python scripts/measure_ladders.py [CODEC ...]

The synthetic workloads take their levels from here. CacheGen's ladder is measured with wider bins than the codec's own:
with one factor on all of its scales, chosen so that the default level (bins x1) costs the paper's bits per element.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kvstream.codec import cachegen
from kvstream.codec.api import Codec, Level
from kvstream.testbed.encoding import calibrate
from kvstream.testbed.engine.loading import bundled_model_path, load_model
from kvstream.testbed.engine.model import Model, calculate_kv, mean_kl
from kvstream.testbed.engine.threads import set_threads
from kvstream.testbed.host import machine
from kvstream.testbed.results.folder import write_whole

OUT = Path(__file__).resolve().parent.parent / "testbed" / "workloads" / "data" / "ladders.json"
PAPER_BITS = 176e6 * 8 / (622e6 / 65_536) / 65_536
"""CacheGen's default level on Mistral-7B (Table 1): 176 MB where 8 bit, 65,536 bytes a token, takes 622 MB."""
CHUNK_TOKENS = 1_536
SAMPLES = 4
DEFAULT = cachegen.SCALES.index(1.0)
TOLERANCE = 0.005


def main(codecs: list[str]) -> None:
    set_threads(None)
    model = load_model(str(bundled_model_path()))
    body: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"ladders": {}}
    for name in codecs:
        body["ladders"][name] = (
            widened(model) if name == "cachegen" else ladder(model, calibrate.make_codec(name, model))
        )
        print(name, json.dumps(body["ladders"][name], indent=1))
    body |= {"model": model.name, "fingerprint": model.fingerprint, "chunk_tokens": CHUNK_TOKENS}
    body |= {key: machine.describe()[key] for key in ("processor", "versions")}
    write_whole(OUT, body)


def widened(model: Model) -> list[dict[str, Any]]:
    """CacheGen's ladder with the factor on its bins at which the default level costs the paper's bits."""
    scales = cachegen.SCALES
    low, high = 1.0, 32.0
    while high / low > 1 + TOLERANCE:
        factor = (low * high) ** 0.5
        codec = with_scales(model, (factor,))
        bits = rate(codec, 0, calculate_kv(model, next(iter(calibrate.samples(model, "check", 1))).context_ids))
        print(f"bins x{factor:.2f}: {bits:.3f} bit/element", file=sys.stderr)
        low, high = (factor, high) if bits > PAPER_BITS else (low, factor)
    found = ladder(model, with_scales(model, tuple(scale * factor for scale in scales)))
    return [level | {"name": f"bins x{scale:g}"} for level, scale in zip(found, scales, strict=True)]


def with_scales(model: Model, scales: tuple[float, ...]) -> Codec:
    """CacheGen's codec with other levels, calibrated for them."""
    cachegen.SCALES = scales
    cachegen.CacheGen.levels = tuple(Level(f"bins x{scale:g}", {"scale": scale}) for scale in scales)
    kv = (calculate_kv(model, sample.context_ids) for sample in calibrate.samples(model, "fit", calibrate.FIT_SAMPLES))
    return cachegen.CacheGen(profile=cachegen.fit(kv))


def ladder(model: Model, codec: Codec) -> list[dict[str, Any]]:
    """Bits per element, as encoded with everything in, and mean KL (nats) of every level."""
    bits, nats = [0.0] * len(codec.levels), [0.0] * len(codec.levels)
    for sample in calibrate.samples(model, "check", SAMPLES):
        exact = calculate_kv(model, sample.context_ids)
        wanted = calibrate.log_probs(model, exact, sample.suffix_ids)
        for level in range(len(codec.levels)):
            coded = calibrate.round_trip(codec, exact, level, CHUNK_TOKENS)
            bits[level] += rate(codec, level, exact) / SAMPLES
            nats[level] += max(0.0, mean_kl(wanted, calibrate.log_probs(model, coded, sample.suffix_ids))) / SAMPLES
    return [
        {"name": level.name, "bits_per_element": round(b, 4), "distortion": round(d, 7)}
        for level, b, d in zip(codec.levels, bits, nats, strict=True)
    ]


def rate(codec: Codec, level: int, kv: torch.Tensor) -> float:
    """Bits per element of one chunk."""
    return 8.0 * len(codec.encode(kv, level, positions=range(kv.shape[2]))) / kv.numel()


if __name__ == "__main__":
    main(sys.argv[1:] or ["cachegen", "uniform", "kvstream"])
