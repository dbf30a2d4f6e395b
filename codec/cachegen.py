"""CacheGen's encoder as the paper describes it (SIGCOMM 2024, section 5.2).

Tokens of a chunk form groups of ten. The first of a group, the anchor, is quantised to 8 bits; each of the other nine
is coded as its difference to the *dequantised* anchor. The bin that differences are rounded to grows with depth: 0.5, 1
and 1.5 for the first, middle and last third of the layers at scale 1, and a level is a scale. Symbols are entropy coded
with one distribution per (layer, K or V, channel), profiled offline, anchors and differences apart.

Choices where the paper is silent: vectors are a token's H * D channels of one layer, keys or values. An
anchor's step is its vector's largest magnitude / 127. A difference's step is `bin * m / 16`, where m is the largest
magnitude of the token's difference vector: bins are in sixteenths of it, so bin 1 gives 33 symbols, about the 32 of
the public code. Scales are kept in the dtype of the cache. Because every step follows its vector, no symbol can leave
the alphabet of its layer and none needs an escape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.api import Codec, Level, Setting, check_finite
from kvstream.codec.coders import Coder, make_coder
from kvstream.codec.container import DTYPE_BYTES, Chunk, Header
from kvstream.codec.entropy.sections import Streams, join
from kvstream.codec.entropy.tables import PROB_SCALE, column_counts
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from kvstream.codec.raw import frombuffer
from kvstream.codec.sharing import share_out
from kvstream.codec.targets import DTYPES, CacheTarget
from kvstream.codec.uniform import as_bytes, checked_scale, quantise

GROUP = 10
ANCHOR_HALF = 127
BINS_PER_MAGNITUDE = 16
BINS = (0.5, 1.0, 1.5)
"""Bins of the first, middle and last third of the layers at scale 1."""
SCALES = (3.0, 2.0, 1.5, 1.0, 0.5)
"""Levels, smallest first; scale 1 is the paper's default."""
PRIOR_SYMBOLS = 64
PIECE = 51 * GROUP
"""Tokens that a decoder holds in float32 at a time."""


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
        layers = self._shape[0]
        self._anchor: Coder = make_coder(coder, self._tables("anchor", [ANCHOR_HALF] * layers))
        self._delta: list[Coder] = [
            make_coder(coder, self._tables(f"delta{level}", halves_of(layers, scale)))
            for level, scale in enumerate(SCALES)
        ]

    @classmethod
    def fit(cls, kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any], **of_model: Any) -> Profile:
        return fit(kv_samples, metadata=metadata)

    def settings(self) -> dict[str, Setting]:
        return {"coder": self.coder_name}

    def _tables(self, name: str, halves: Sequence[int]) -> list[NDArray[Any]]:
        """The tables of each layer's keys and values, of the symbols that the layer can have."""
        assert self.profile is not None
        layers, heads, head_dim = self._shape
        shape = (layers * 2 * heads * head_dim, 2 * max(halves) + 1)
        found = self.profile.tensor(name, np.uint16, shape).reshape(layers, 2, -1, shape[1])
        for layer, half in enumerate(halves):
            if found[layer, :, :, 2 * half + 1 :].any():
                raise CodecError(
                    f"profile {self.profile.sha256[:12]} gives slots of {name!r} to symbols that layer {layer} does "
                    "not have; calibrate again with --fresh"
                )
        return [side[:, : 2 * half + 1] for sides, half in zip(found, halves, strict=True) for side in sides]

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        self._check_shape(header)
        anchor, delta = self._anchor, self._delta[level]
        steps = delta_steps(header.layers, SCALES[level]).tolist()
        found: list[Any] = [None] * header.layers

        def coded(coder: Coder, layer: int, symbols: Tensor, threads: int) -> list[Streams]:
            sides = enumerate(symbols) if symbols.shape[1] else ()
            return [coder.encode(2 * layer + side, columns_first(part), threads) for side, part in sides]

        def some(layers: range, threads: int) -> None:
            for layer in layers:
                anchor_scale, anchors, delta_scale, deltas = layer_symbols(kv[layer], steps[layer])
                found[layer] = (
                    as_bytes(anchor_scale), as_bytes(delta_scale),
                    coded(anchor, layer, anchors, threads), coded(delta, layer, deltas, threads),
                )  # fmt: skip

        share_out(some, header.layers, header.layers)
        ascl, dscl, anch, delt = zip(*found, strict=True)
        return {
            "ascl": b"".join(ascl),
            "dscl": b"".join(dscl),
            "anch": join(list(chain(*anch))),
            "delt": join(list(chain(*delt))) if header.tokens > 1 else b"",
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
        of_token = torch.arange(PIECE) // GROUP
        is_delta = torch.arange(PIECE) % GROUP != 0
        steps = delta_steps(layers, SCALES[header.level])

        def some(numbers: range, threads: int) -> None:
            for number in numbers:
                layer, side = divmod(number, 2)
                anchors = torch.from_numpy(anchor.decode(anchor_streams, number, threads))
                deltas = torch.from_numpy(delta.decode(delta_streams, number, threads))
                anchor_step = anchor_scale[layer, side] / ANCHOR_HALF
                step = delta_scale[layer, side] * steps[layer]
                half = half_of(float(steps[layer]))
                for first in range(0, tokens, PIECE):
                    stop = min(first + PIECE, tokens)
                    own = slice(n_anchors(first), n_anchors(stop))
                    values = ((anchors[:, own].float() - ANCHOR_HALF) * anchor_step[own]).t()[of_token[: stop - first]]
                    own = slice(first - n_anchors(first), stop - n_anchors(stop))
                    values[is_delta[: stop - first]] += ((deltas[:, own].float() - half) * step[own]).t()
                    block = values.view(-1, header.heads, header.head_dim)
                    target.write(layer, side, block.to(target.device), first)

        share_out(some, 2 * layers, layers)

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        """Bits by layer of anchors and differences together, scales apart; scales count as ideally coded."""
        header = chunk.header
        groups = n_anchors(header.tokens)
        bits, ideal = 0 * np.arange(2 * header.layers), 8.0 * (len(chunk.section("ascl")) + len(chunk.section("dscl")))
        for coder, tag, tokens in (
            (self._anchor, "anch", groups), (self._delta[header.level], "delt", header.tokens - groups)
        ):  # fmt: skip
            streams = coder.parse(chunk.section(tag), tokens)
            bits += coder.block_bits(streams)
            ideal += coder.ideal_bits(streams)
        return {
            "bits_by_layer": (bits.reshape(-1, 2) / (header.elements / header.layers / 2)).tolist(),
            "ideal_bits_per_element": ideal / header.elements,
        }

    def _check_shape(self, header: Header) -> None:
        shape = (header.layers, header.heads, header.head_dim)
        if shape != self._shape:
            raise CodecError(f"the cache has (layers, heads, head_dim) {shape}, the profile's model {self._shape}")


def n_anchors(tokens: int) -> int:
    """Groups in `tokens` tokens; the last may be short."""
    return -(-tokens // GROUP)


def delta_steps(layers: int, scale: float) -> Tensor:
    """Step of each layer's differences as a part of their largest magnitude: float32 `[L]`."""
    third = torch.arange(layers) * 3 // layers
    return torch.tensor(BINS)[third] * scale / BINS_PER_MAGNITUDE


def half_of(step: float) -> int:
    """Largest symbol, counted from the middle, that rounding in this step can give."""
    return int(1 / step + 0.5)


def halves_of(layers: int, scale: float) -> list[int]:
    """The same for every layer; that of the first is the largest, and sets the width of a level's tables."""
    return [half_of(step) for step in delta_steps(layers, scale).tolist()]


def layer_symbols(sides: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and symbols of one layer's keys and values `[2, T, H, D]`, on the CPU.

    Returns anchor scales `[2, A]`, anchor symbols uint8 `[2, A, C]`, difference scales `[2, T - A]` and difference
    symbols `[2, T - A, C]`, C = H * D. Raises CodecError for a difference that the cache's dtype cannot hold.
    """
    rows = sides.flatten(2).cpu()
    is_anchor = torch.arange(rows.shape[1]) % GROUP == 0
    anchor_of_delta = (torch.arange(rows.shape[1]) // GROUP)[~is_anchor]
    anchor_rows = rows[:, is_anchor]
    anchor_scale = anchor_rows.abs().amax(dim=2)
    anchors = quantise(anchor_rows, anchor_scale, ANCHOR_HALF)
    restored = (anchors.float() - ANCHOR_HALF) * (anchor_scale.float() / ANCHOR_HALF)[..., None]
    delta = rows[:, ~is_anchor].float() - restored[:, anchor_of_delta]
    delta_scale = delta.abs().amax(dim=2).to(rows.dtype)
    if not bool(torch.isfinite(delta_scale).all()):
        raise CodecError(
            f"a token differs from its anchor by more than {rows.dtype} can hold ({torch.finfo(rows.dtype).max:g}); "
            "encode the cache as bfloat16 or float32, or use another codec"
        )
    width = delta_scale.float() * step
    # A width of 0, or one so small that it is 0 in float32, means that there is nothing to code.
    width = torch.where(width > 0, width, torch.inf)[..., None]
    half = half_of(step)
    deltas = delta.div_(width).round_().clamp_(-half, half).add_(half).to(torch.uint8)
    return anchor_scale, anchors, delta_scale, deltas


def symbols_of(kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_symbols` of all layers of `kv` `[L, 2, T, H, D]`, stacked."""
    steps = delta_steps(len(kv), scale).tolist()
    layers = [layer_symbols(sides, step) for sides, step in zip(kv, steps, strict=True)]
    anchor_scale, anchors, delta_scale, deltas = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return anchor_scale, anchors, delta_scale, deltas


def columns_first(symbols: Tensor) -> NDArray[np.uint8]:
    """uint8 `[..., T, C]` in the coder's order: `[... * C, T]`."""
    return symbols.transpose(-2, -1).flatten(0, -2).contiguous().numpy()


def fit(kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any] | None = None) -> Profile:
    """Profile the symbol distributions of a model from KV caches `[L, 2, T, H, D]` of its contexts.

    A few tens of thousands of tokens suffice. Every column's histogram is smoothed with that of its layer, so that
    symbols that a column never showed can still be coded.
    """
    counts: dict[str, NDArray[np.int64]] = {}
    shape: tuple[int, ...] = ()
    tokens = 0
    for kv in kv_samples:
        check_finite(kv, "a KV sample")
        layers, _, length, heads, head_dim = kv.shape
        if not shape:
            shape = (layers, heads, head_dim)
            columns = layers * 2 * heads * head_dim
            counts["anchor"] = np.zeros((columns, 2 * ANCHOR_HALF + 1), np.int64)
            for level, scale in enumerate(SCALES):
                counts[f"delta{level}"] = np.zeros((columns, 2 * halves_of(layers, scale)[0] + 1), np.int64)
        elif (layers, heads, head_dim) != shape:
            raise CodecError(f"KV samples have different shapes: {shape} and {(layers, heads, head_dim)}")
        for level, scale in enumerate(SCALES):
            _, anchors, _, deltas = symbols_of(kv, scale)
            found = counts[f"delta{level}"]
            found += column_counts(columns_first(deltas), found.shape[1])
        counts["anchor"] += column_counts(columns_first(anchors), 2 * ANCHOR_HALF + 1)
        tokens += length
    if not shape:
        raise CodecError("a profile needs at least one KV sample")
    layers, heads, head_dim = shape
    tensors = {"anchor": smooth_tables(counts["anchor"], [ANCHOR_HALF] * layers)}
    for level, scale in enumerate(SCALES):
        tensors[f"delta{level}"] = smooth_tables(counts[f"delta{level}"], halves_of(layers, scale))
    facts = {
        **(metadata or {}),
        "codec": CacheGen.codec_id,
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "calibration_tokens": tokens,
    }
    return Profile(tensors, facts)


def smooth_tables(counts: NDArray[np.int64], halves: Sequence[int]) -> NDArray[np.uint16]:
    """Frequencies `[C, S]` that sum to 1,024, from histograms `[C, S]` of layers with symbols 0 to 2 * half.

    The distribution of a layer's keys or values counts as `PRIOR_SYMBOLS` further symbols of each column. Every symbol
    of the layer gets one slot; the others are distributed in proportion, by largest remainder.
    """
    tables = np.zeros(counts.shape, np.uint16)
    columns = len(counts) // (2 * len(halves))
    for number, half in enumerate(np.repeat(halves, 2).tolist()):
        alphabet = 2 * half + 1
        part = (slice(number * columns, (number + 1) * columns), slice(alphabet))
        own = counts[part]
        pooled = own.sum(axis=0) + 1.0
        p = (own + PRIOR_SYMBOLS * pooled / pooled.sum()) / (own.sum(axis=1, keepdims=True) + PRIOR_SYMBOLS)
        share = p * (PROB_SCALE - alphabet)
        slots = np.floor(share).astype(np.int64)
        missing = (PROB_SCALE - alphabet) - slots.sum(axis=1)
        rank = np.argsort(np.argsort(slots - share, axis=1, kind="stable"), axis=1, kind="stable")
        slots += rank < missing[:, None]
        tables[part] = slots + 1
    return tables
