"""How much memory encoding and decoding take, in a process of its own:

    python -m tests.codec.memory_probe deep|small THREADS CODEC...

Prints JSON: for each codec the most memory held while decoding, input and output included, over their bytes, and while
encoding, input included, over the input's; the larger of the lowest and the highest level. A `deep` cache has the depth
and dtype of a 7B model, a `small` one the shape of the bundled model's: a codec works layer by layer, so that its
buffers weigh more there.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from kvstream.codec import cachegen, registry
from kvstream.codec.kvstream import fit
from kvstream.codec.profile import Profile
from kvstream.codec.transform import Rope
from tests.codec.synthetic import synthetic_kv

SHAPES = {"deep": (32, 4096, 4, 32), "small": (8, 1024, 5, 32)}
"""Layers, tokens, heads, dimensions."""
Result = TypeVar("Result")


def rope(layers: int, dim: int) -> Rope:
    return Rope(10_000.0 ** -(torch.arange(dim // 2) / (dim // 2)).repeat(layers, 1))


def cache(layers: int, tokens: int, heads: int, dim: int, seed: int) -> torch.Tensor:
    """Synthetic, with keys rotated by their positions as in a model."""
    kv = synthetic_kv(layers, tokens, heads, dim, seed=seed)
    turn = rope(layers, dim)
    for layer in range(layers):
        keys = kv[layer, 0].float().transpose(0, 1).contiguous()
        kv[layer, 0] = turn.rotate(keys, layer, range(tokens)).transpose(0, 1)
    return kv


def profile(name: str, layers: int, heads: int, dim: int) -> Profile | None:
    """Fitted to another such cache, where the codec needs one."""
    if name == "kvstream":
        sample = cache(layers, 600, heads, dim, seed=2)
        return fit([sample], rope=rope(layers, dim), target_bits=(1.2, 3.6))
    return cachegen.fit([cache(layers, 600, heads, dim, seed=2)]) if name == "cachegen" else None


def peak_bytes(work: Callable[[], Result]) -> tuple[Result, int]:
    """What `work` returns, and the peak memory of the process above its level before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is not returned would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    return result, _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    layers, tokens, heads, dim = SHAPES[sys.argv[1]]
    torch.set_num_threads(int(sys.argv[2]))
    kv = cache(layers, tokens, heads, dim, seed=1)
    size = kv.numel() * kv.element_size()
    found = {}
    for name in sys.argv[3:]:
        codec = registry.make(name, {}, profile(name, layers, heads, dim))
        decode, encode = [], []
        for level in sorted({0, len(codec.levels) - 1}):
            few = codec.encode(kv[:, :, :64], level, positions=range(64))
            codec.decode(few)  # what is compiled and cached stays out of the measurement
            data, more = peak_bytes(lambda codec=codec, level=level: codec.encode(kv, level, positions=range(tokens)))
            encode.append((size + more) / size)
            out, more = peak_bytes(lambda codec=codec, data=data: codec.decode(data))
            decode.append((len(data) + more) / (len(data) + size))
            del out
        found[name] = {"decode": max(decode), "encode": max(encode)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
