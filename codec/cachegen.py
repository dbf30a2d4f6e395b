"""CacheGen's encoder as the paper describes it (SIGCOMM 2024, section 5.2).

Tokens of a chunk form groups of ten. The first of a group, the anchor, is quantised to 8 bits; each of the other nine
is coded as its difference to the *dequantised* anchor. The bin that differences are rounded to grows with depth: 0.5, 1
and 1.5 for the first, middle and last third of the layers at scale 1, and a level is a scale. Symbols are entropy coded
with one distribution per (layer, K or V, channel), profiled offline, anchors and differences apart.

What the paper leaves open is settled here. Vectors are a token's H * D channels of one layer, keys or values. An
anchor's step is its vector's largest magnitude / 127. A difference's step is `bin * m / 16`, where m is the largest
magnitude of the token's difference vector: bins are in sixteenths of it, so bin 1 gives 33 symbols, about the 32 of
the public code. Scales are kept in the dtype of the cache. Because every step follows its vector, no symbol can leave
the profiled alphabet and none needs an escape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec.api import Codec, Level, Setting
from codec.coders import Coder, make_coder
from codec.container import DTYPE_BYTES, Chunk, Header
from codec.entropy.tables import PROB_SCALE, column_counts
from codec.errors import CodecError
from codec.profile import Profile
from codec.raw import frombuffer
from codec.targets import DTYPES, CacheTarget
from codec.uniform import as_bytes, checked_scale, quantise

GROUP = 10
ANCHOR_HALF = 127
BINS_PER_MAGNITUDE = 16
BINS = (0.5, 1.0, 1.5)
"""Bins of the first, middle and last third of the layers at scale 1."""
SCALES = (3.0, 2.0, 1.5, 1.0, 0.5)
"""Levels, smallest first; scale 1 is the paper's default."""
PRIOR_SYMBOLS = 64


class CacheGen(Codec):
    """Sections `ascl`, `dscl` (scales `[L, 2, tokens]` in the dtype of the cache), `anch`, `delt` (coded symbols)."""

    codec_id = "cachegen"
    needs_profile = True
    levels = tuple(Level(f"bins x{scale:g}", {"scale": scale}) for scale in SCALES)

    def __init__(self, *, profile: Profile | None = None, coder: str = "rans") -> None:
        super().__init__(profile=profile)
        assert self.profile is not None
        self.coder_name = coder
        if self.profile.codec_id != self.codec_id:
            raise CodecError(f"profile is for codec {self.profile.codec_id}, not {self.codec_id}: calibrate again")
        self._shape = tuple(self.profile.number(name) for name in ("layers", "heads", "head_dim"))
        layers, heads, head_dim = self._shape
        columns = layers * 2 * heads * head_dim
        anchor = self.profile.tensor("anchor", np.uint16, (columns, 2 * ANCHOR_HALF + 1))
        self._anchor: Coder = make_coder(coder, anchor)
        self._delta: list[Coder] = [
            make_coder(coder, self.profile.tensor(f"delta{level}", np.uint16, (columns, 2 * largest_half(scale) + 1)))
            for level, scale in enumerate(SCALES)
        ]

    def settings(self) -> dict[str, Setting]:
        return {"coder": self.coder_name}

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        self._check_shape(header)
        anchor_scale, anchors, delta_scale, deltas = symbols_of(kv, SCALES[level])
        return {
            "ascl": as_bytes(anchor_scale),
            "dscl": as_bytes(delta_scale),
            "anch": self._anchor.encode(columns_first(anchors)),
            "delt": self._delta[level].encode(columns_first(deltas)),
        }

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        self._check_shape(header)
        rows = header.layers * 2 * DTYPE_BYTES[header.dtype]
        chunk.section("ascl", rows * n_anchors(header.tokens))
        chunk.section("dscl", rows * (header.tokens - n_anchors(header.tokens)))
        chunk.section("anch")
        chunk.section("delt")

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        layers, tokens = header.layers, header.tokens
        groups = n_anchors(tokens)
        dtype = DTYPES[header.dtype]
        anchor_scale = checked_scale(frombuffer(chunk.section("ascl"), dtype)).view(layers, 2, groups).float()
        delta_scale = checked_scale(frombuffer(chunk.section("dscl"), dtype)).view(layers, 2, tokens - groups).float()
        anchor, delta = self._anchor, self._delta[header.level]
        anchor_streams = anchor.parse(chunk.section("anch"), groups)
        delta_streams = delta.parse(chunk.section("delt"), tokens - groups)
        of_token = torch.arange(tokens) // GROUP
        is_delta = torch.arange(tokens) % GROUP != 0
        steps = delta_steps(layers, SCALES[header.level])
        for layer in range(layers):
            half = half_of(float(steps[layer]))
            for side in (0, 1):
                low = (2 * layer + side) * header.heads * header.head_dim
                columns = (low, low + header.heads * header.head_dim)
                anchors = torch.from_numpy(anchor.decode(anchor_streams, *columns))
                deltas = torch.from_numpy(delta.decode(delta_streams, *columns))
                anchor_step = anchor_scale[layer, side] / ANCHOR_HALF
                values = ((anchors.float() - ANCHOR_HALF) * anchor_step).t()[of_token]
                step = delta_scale[layer, side] * steps[layer]
                values[is_delta] += ((deltas.float() - half) * step).t()
                target.write(layer, side, values.view(tokens, header.heads, header.head_dim).to(target.device))

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        """Bits by layer of anchors and differences together, scales apart."""
        header = chunk.header
        groups = n_anchors(header.tokens)
        anchors = self._anchor.column_bits(chunk.section("anch"), groups)
        deltas = self._delta[header.level].column_bits(chunk.section("delt"), header.tokens - groups)
        by_layer = (anchors + deltas).reshape(header.layers, 2, -1).sum(axis=2)
        return {"bits_by_layer": (by_layer / (header.elements / header.layers / 2)).tolist()}

    def _check_shape(self, header: Header) -> None:
        shape = (header.layers, header.heads, header.head_dim)
        if shape != self._shape:
            raise CodecError(f"the cache has (layers, heads, head_dim) {shape}, the profile's model {self._shape}")


def n_anchors(tokens: int) -> int:
    """Groups that `tokens` tokens make, the last of which may be short."""
    return -(-tokens // GROUP)


def delta_steps(layers: int, scale: float) -> Tensor:
    """Step of each layer's differences as a part of their largest magnitude: float32 `[L]`."""
    third = torch.arange(layers) * 3 // layers
    return torch.tensor(BINS)[third] * scale / BINS_PER_MAGNITUDE


def half_of(step: float) -> int:
    """Largest symbol, counted from the middle, that rounding in this step can give."""
    return int(1 / step + 0.5)


def largest_half(scale: float) -> int:
    """The same for the layers with the finest bins: it sets the alphabet of a level."""
    return half_of(BINS[0] * scale / BINS_PER_MAGNITUDE)


def symbols_of(kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and symbols of `kv` `[L, 2, T, H, D]`.

    Returns anchor scales `[L, 2, A]`, anchor symbols uint8 `[L, 2, A, C]`, difference scales `[L, 2, T - A]` and
    difference symbols `[L, 2, T - A, C]`, C = H * D.
    """
    layers, _, tokens, heads, head_dim = kv.shape
    is_anchor = torch.arange(tokens) % GROUP == 0
    anchor_of_delta = (torch.arange(tokens) // GROUP)[~is_anchor]
    n, columns = n_anchors(tokens), heads * head_dim
    anchor_scale = torch.empty((layers, 2, n), dtype=kv.dtype)
    delta_scale = torch.empty((layers, 2, tokens - n), dtype=kv.dtype)
    anchors = torch.empty((layers, 2, n, columns), dtype=torch.uint8)
    deltas = torch.empty((layers, 2, tokens - n, columns), dtype=torch.uint8)
    # layer by layer, so that the differences of all are never held in float32
    for layer, step in enumerate(delta_steps(layers, scale).tolist()):
        rows = kv[layer].flatten(2)
        anchor_rows = rows[:, is_anchor]
        anchor_scale[layer] = anchor_rows.abs().amax(dim=2)
        anchors[layer] = quantise(anchor_rows, anchor_scale[layer], ANCHOR_HALF)
        restored = (anchors[layer].float() - ANCHOR_HALF) * (anchor_scale[layer].float() / ANCHOR_HALF)[..., None]
        delta = rows[:, ~is_anchor].float() - restored[:, anchor_of_delta]
        largest = delta.abs().amax(dim=2).to(kv.dtype)
        if kv.dtype == torch.float16:
            largest.clamp_(max=torch.finfo(torch.float16).max)
        delta_scale[layer] = largest
        width = largest.float() * step
        # A width of 0, or one so small that it is 0 in float32, means that there is nothing to code.
        width = torch.where(width > 0, width, torch.inf)[..., None]
        half = half_of(step)
        deltas[layer] = delta.div_(width).round_().clamp_(-half, half).add_(half).to(torch.uint8)
    return anchor_scale, anchors, delta_scale, deltas


def columns_first(symbols: Tensor) -> NDArray[np.uint8]:
    """uint8 `[L, 2, T, C]` as the coder wants it: `[L * 2 * C, T]`."""
    return symbols.transpose(2, 3).flatten(0, 2).contiguous().numpy()


def fit(kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any] | None = None) -> Profile:
    """Profile the symbol distributions of a model from KV caches `[L, 2, T, H, D]` of its contexts.

    A few tens of thousands of tokens suffice. Every column's histogram is smoothed with that of its layer, so that a
    symbol that a column did not show is still coded.
    """
    anchor_counts: NDArray[np.int64] | None = None
    delta_counts: list[NDArray[np.int64]] = []
    shape: tuple[int, ...] = ()
    tokens = 0
    for kv in kv_samples:
        layers, _, length, heads, head_dim = kv.shape
        if anchor_counts is None:
            shape = (layers, heads, head_dim)
            columns = layers * 2 * heads * head_dim
            anchor_counts = np.zeros((columns, 2 * ANCHOR_HALF + 1), np.int64)
            delta_counts = [np.zeros((columns, 2 * largest_half(s) + 1), np.int64) for s in SCALES]
        elif (layers, heads, head_dim) != shape:
            raise CodecError(f"KV samples have different shapes: {shape} and {(layers, heads, head_dim)}")
        for level, scale in enumerate(SCALES):
            _, anchors, _, deltas = symbols_of(kv, scale)
            delta_counts[level] += column_counts(columns_first(deltas), delta_counts[level].shape[1])
            if level == 0:
                anchor_counts += column_counts(columns_first(anchors), anchor_counts.shape[1])
        tokens += length
    if anchor_counts is None:
        raise CodecError("a profile needs at least one KV sample")
    tensors = {"anchor": smooth_tables(anchor_counts, 2 * shape[0])}
    for level, counts in enumerate(delta_counts):
        tensors[f"delta{level}"] = smooth_tables(counts, 2 * shape[0])
    layers, heads, head_dim = shape
    facts = {
        **(metadata or {}),
        "codec": CacheGen.codec_id,
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "calibration_tokens": tokens,
    }
    return Profile(tensors, facts)


def smooth_tables(counts: NDArray[np.int64], blocks: int) -> NDArray[np.uint16]:
    """Frequencies `[C, S]` that sum to 1,024, none of them 0, from histograms `[C, S]` of equal `blocks` of columns.

    The distribution of the block counts as `PRIOR_SYMBOLS` further symbols of each column. Every symbol gets one slot,
    the others are shared out in proportion, by largest remainder.
    """
    columns, alphabet = counts.shape
    pooled = counts.reshape(blocks, -1, alphabet).sum(axis=1) + 1.0
    prior = np.repeat(pooled / pooled.sum(axis=1, keepdims=True), columns // blocks, axis=0)
    p = (counts + PRIOR_SYMBOLS * prior) / (counts.sum(axis=1, keepdims=True) + PRIOR_SYMBOLS)
    share = p * (PROB_SCALE - alphabet)
    slots = np.floor(share).astype(np.int64)
    missing = (PROB_SCALE - alphabet) - slots.sum(axis=1)
    rank = np.argsort(np.argsort(slots - share, axis=1, kind="stable"), axis=1, kind="stable")
    slots += rank < missing[:, None]
    return (slots + 1).astype(np.uint16)
