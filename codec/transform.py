"""What happens to KV values before quantisation, and its inverse: undo RoPE, remove means, change the basis.

All arithmetic is float32. The angle of a rotary pair is the float32 product of position and frequency, so that encoder
and decoder rotate by exactly the same amount.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstream.codec.errors import CodecError


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding of a model's keys.

    `inv_freq` is float32 `[L, R / 2]`: the angle (radians) by which each position rotates each pair of layer l; R <= D
    is the number of rotary dimensions, the first of a head (partial rotary embedding). Pair i is dimensions
    (i, i + R/2), or (2i, 2i + 1) where `interleaved`. Scaled variants (linear, Llama 3, YaRN) only change the
    frequencies; a factor on the rotated keys, as in YaRN, needs no undoing.
    """

    inv_freq: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 2 or self.inv_freq.dtype != torch.float32:
            raise CodecError("rotary frequencies are float32 [layers, rotary_dims / 2]")

    def rotate(self, keys: Tensor, layer: int, positions: range, *, undo: bool = False) -> Tensor:
        """Keys `[..., T, D]` float32 of one layer rotated by their positions, or back; in place."""
        self.rotate_layers(keys.movedim(-2, 0).unsqueeze(0), range(layer, layer + 1), positions, undo=undo)
        return keys

    def rotate_layers(self, keys: Tensor, layers: range, positions: range, *, undo: bool = False) -> None:
        """Keys `[layers, T, ..., D]` float32 of some layers turned by their positions, or back, in place."""
        frequencies = self.inv_freq[layers.start : layers.stop].to(keys.device)
        half = frequencies.shape[1]
        at = torch.arange(positions.start, positions.stop, positions.step, dtype=torch.float32, device=keys.device)
        angle = (at[None, :, None] * frequencies[:, None]).view(
            len(frequencies), len(at), *[1] * (keys.dim() - 3), half
        )
        cos, sin = angle.cos(), angle.sin()
        if undo:
            sin = -sin
        if self.interleaved:
            first, second = keys[..., 0 : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        else:
            first, second = keys[..., :half], keys[..., half : 2 * half]
        turned = (first * cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(first, sin)
        first.copy_(turned)


def vectors(kv: Tensor, layers: range, rope: Rope | None, positions: range, mean: Tensor | None = None) -> Tensor:
    """float32 `[T, layers * 2 * H * D]` of some layers of `kv` `[L, 2, T, H, D]`: keys rotated back to position 0, each
    value less its mean (`[L, 2, H, D]`)."""
    part = kv[layers.start : layers.stop].to(torch.float32, copy=True)
    if rope is not None:
        rope.rotate_layers(part[:, 0], layers, positions, undo=True)
    if mean is not None:
        part -= mean[layers.start : layers.stop, :, None].to(part.device)
    return part.permute(2, 0, 1, 3, 4).flatten(1)


def restore(rows: Tensor, layers: range, rope: Rope | None, positions: range, mean: Tensor) -> Tensor:
    """Inverse of `vectors`: values float32 `[layers, 2, T, H, D]` of `[T, layers * 2 * H * D]`, which it overwrites."""
    part = rows.unflatten(1, mean[layers.start : layers.stop].shape)
    part += mean[layers.start : layers.stop].to(rows.device)
    part = part.permute(1, 2, 0, 3, 4)
    if rope is not None:
        rope.rotate_layers(part[:, 0], layers, positions)
    return part
