"""How much memory encoding and decoding take, in a process of its own: python -m tests.codec.memory_probe CODEC...

Prints JSON: for each codec the most memory held while decoding, input and output included, over their bytes, and while
encoding, input included, over the input's. The cache has the depth and dtype of a 7B model; a codec works layer by
layer, so that on a shallower model its buffers weigh more.
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

from codec import cachegen, kvstream, registry
from codec.profile import Profile
from codec.transform import Rope
from tests.codec.synthetic import synthetic_kv

L, T, H, D = 32, 4096, 4, 32
Result = TypeVar("Result")


ROPE = Rope(10_000.0 ** -(torch.arange(D // 2) / (D // 2)).repeat(L, 1))
PROFILES: dict[str, Callable[[], Profile]] = {
    "kvstream": lambda: kvstream.fit([cache(600, 2)], rope=ROPE, target_bits=(1.2,)),
    "cachegen": lambda: cachegen.fit([cache(600, 2)]),
}


def cache(tokens: int, seed: int) -> torch.Tensor:
    """Synthetic, its keys turned by their positions as a model's are."""
    kv = synthetic_kv(L, tokens, H, D, seed=seed)
    for layer in range(L):
        keys = kv[layer, 0].float().transpose(0, 1).contiguous()
        kv[layer, 0] = ROPE.rotate(keys, layer, range(tokens)).transpose(0, 1)
    return kv


def peak_bytes(work: Callable[[], Result]) -> tuple[Result, int]:
    """What `work` returns, and the most memory that the process held beyond what it did before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not given back would be used without being seen
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    return result, _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    torch.set_num_threads(1)
    kv = cache(T, 1)
    size = kv.numel() * kv.element_size()
    found = {}
    for name in sys.argv[1:]:
        codec = registry.make(name, {}, PROFILES[name]() if name in PROFILES else None)
        few = codec.encode(kv[:, :, :64], 0, positions=range(64))
        codec.decode(few)  # what is compiled and cached stays out of the measurement
        data, encoding = peak_bytes(lambda codec=codec: codec.encode(kv, 0, positions=range(T)))
        out, decoding = peak_bytes(lambda codec=codec, data=data: codec.decode(data))
        assert isinstance(out, torch.Tensor)
        found[name] = {
            "decode": (len(data) + decoding) / (len(data) + size),
            "encode": (size + encoding) / size,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
