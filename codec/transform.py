"""What is done to KV values before they are quantised: undo RoPE, remove means, change the basis, and back.

All arithmetic is float32. The angle of a rotary pair is the float32 product of position and frequency, so that encoder
and decoder rotate by exactly the same amount.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import CodecError


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding of a model's keys.

    `inv_freq` is float32 `[L, R / 2]`: the angle (radians) by which each position turns each pair of layer l; R <= D is
    the number of rotary dimensions, the first of a head (partial rotary embedding). Pair i is dimensions (i, i + R/2),
    or (2i, 2i + 1) where `interleaved`. Scaled variants (linear, Llama 3, YaRN) are frequencies like any others; a
    factor on the rotated keys, as YaRN has, needs no undoing.
    """

    inv_freq: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 2 or self.inv_freq.dtype != torch.float32:
            raise CodecError("rotary frequencies are float32 [layers, rotary_dims / 2]")

    def rotate(self, keys: Tensor, layer: int, positions: range, *, undo: bool = False) -> Tensor:
        """Keys `[..., T, D]` float32 of one layer turned by their positions, or back. Works in place."""
        frequencies = self.inv_freq[layer].to(keys.device)
        half = len(frequencies)
        at = torch.arange(positions.start, positions.stop, dtype=torch.float32, device=keys.device)
        angle = at[:, None] * frequencies
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
        return keys


def analyse(
    kv: Tensor, layer: int, side: int, mean: Tensor, inverse: Tensor, rope: Rope | None, positions: range
) -> Tensor:
    """Coefficients `[H, D, T]` (float32) of one layer's keys (`side` 0) or values (1) of `kv` `[L, 2, T, H, D]`.

    `mean` is `[H, D]`, `inverse` `[H, D, D]` maps a value to its coefficients: `c = inverse @ (x - mean)`.
    """
    block = kv[layer, side].float().permute(1, 0, 2).clone()
    if side == 0 and rope is not None:
        rope.rotate(block, layer, positions, undo=True)
    block -= mean[:, None, :]
    return torch.bmm(inverse, block.transpose(1, 2))


def synthesise(
    coefficients: Tensor, layer: int, side: int, mean: Tensor, basis: Tensor, rope: Rope | None, positions: range
) -> Tensor:
    """Inverse of `analyse`: values `[T, H, D]` (float32) from coefficients `[H, T, D]` (any strides) and `basis`
    `[H, D, D]`: `x = basis @ c + mean`."""
    block = torch.baddbmm(mean[:, None, :], coefficients, basis.transpose(1, 2))
    if side == 0 and rope is not None:
        rope.rotate(block, layer, positions)
    return block.permute(1, 0, 2)
