"""KV tensors to bytes and back.

A codec turns one chunk of a KV cache (`[L, 2, T, H, D]`: layer, K or V, token, KV head, head dimension) into a
self-describing, checksummed byte string at one of several levels, and back. `registry.make` builds one by name,
`api.Codec` is the contract, `container` the byte format they share.
"""

from __future__ import annotations


def warm_up() -> None:
    """Compile (or load from cache) everything that decoding on the CPU uses.

    Call it once before latency matters: the first decode otherwise pays for the compiler.
    """
    from kvstream.codec.warm import warm_up_cpu

    warm_up_cpu()
