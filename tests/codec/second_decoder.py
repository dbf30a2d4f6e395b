"""A second decoder of every codec, written from docs/bitstream.md alone: NumPy and the standard library, no other code.

Short and slow. Where it disagrees with the first one, the page or the code is wrong.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = bytes
Floats = NDArray[np.float64]
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class Chunk:
    codec: str
    level: int
    dtype: str
    start: int
    shape: tuple[int, int, int, int]  # L, T, H, D
    sections: dict[str, Bytes]


def read_container(data: Bytes) -> Chunk:
    layout = struct.Struct("<4sBBBB16s32sQIIIII")
    magic, version, level, dtype, flags, codec, _, start, L, T, H, D, n = layout.unpack_from(data)
    assert (magic, version, flags) == (b"KVST", 1, 0)
    at = layout.size + 16 * n
    assert zlib.crc32(data[:at]) == int.from_bytes(data[at : at + 4], "little")
    table = list(struct.iter_unpack("<4sIQ", data[layout.size : at]))
    at += 4
    sections = {}
    for tag, crc, length in table:
        sections[tag.decode()] = data[at : at + length]
        assert zlib.crc32(data[at : at + length]) == crc
        at += length
    assert at == len(data)
    return Chunk(codec.rstrip(b"\0").decode(), level, DTYPES[dtype], start, (L, T, H, D), sections)


def read_profile(data: Bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors and facts of a safetensors file: 8 bytes of length, a JSON header, the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = json.loads(header.pop("__metadata__")["kvstream"])
    kinds = {"F32": "<f4", "F16": "<f2", "U16": "<u2", "U32": "<u4", "U8": "u1"}
    tensors = {}
    for name, about in header.items():
        first, last = (8 + length + offset for offset in about["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], kinds[about["dtype"]]).reshape(about["shape"])
    return tensors, facts


def floats(data: Bytes, dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"float16": "<f2", "float32": "<f4"}[dtype]).astype(np.float64)


def read_streams(section: Bytes, columns: int, tokens: int, unit: int) -> tuple[list[int], list[list[Bytes]]]:
    """Tokens of each segment, and the bytes of its columns' streams."""
    coded, segment_tokens, units = struct.unpack_from("<III", section)
    assert coded == tokens
    assert 1 <= segment_tokens <= tokens
    lengths_of_segments = [min(segment_tokens, tokens - first) for first in range(0, tokens, segment_tokens)]
    n = columns * len(lengths_of_segments)
    groups = -(-n // 32)
    shortest = struct.unpack_from(f"<{groups}H", section, 12)
    width = section[12 + 2 * groups : 12 + 3 * groups]
    at = (12 + 3 * groups + 3) // 4 * 4
    lengths: list[int] = []
    for least, bits in zip(shortest, width, strict=True):
        packed = int.from_bytes(section[at : at + 4 * bits], "little")
        lengths += [least + ((packed >> (i * bits)) & ((1 << bits) - 1)) for i in range(32)]
        at += 4 * bits
    assert sum(lengths[:n]) == units
    assert len(section) == at + unit * units + 2
    streams = []
    for length in lengths[:n]:
        streams.append(section[at : at + unit * length])
        at += unit * length
    return lengths_of_segments, [streams[s * columns : (s + 1) * columns] for s in range(len(lengths_of_segments))]


def rans_stream(data: Bytes, frequencies: NDArray[Any], tokens: int) -> list[int]:
    owner = np.repeat(np.arange(len(frequencies)), frequencies)
    starts = np.cumsum(frequencies.astype(np.int64)) - frequencies
    words = [w for (w,) in struct.iter_unpack("<H", data)]
    x = 0
    for _ in range(min(2, len(words))):
        x = x << 16 | words.pop(0)
    symbols = []
    for _ in range(tokens):
        slot = x % 1024
        s = int(owner[slot])
        symbols.append(s)
        x = int(frequencies[s]) * (x // 1024) + slot - int(starts[s])
        if x < 1 << 16 and words:
            x = x << 16 | words.pop(0)
    assert x == 0
    assert not words
    return symbols


def arithmetic_stream(data: Bytes, counts: NDArray[Any], tokens: int) -> list[int]:
    """`counts` are the S + 1 cumulative ones, from 0 to 65,536."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).tolist()
    at = 32
    value = int("".join(map(str, (bits + [0] * 32)[:32])), 2)
    low, high = 0, (1 << 32) - 1
    symbols = []
    for _ in range(tokens):
        span = high - low + 1
        count = ((value - low + 1) * 65_536 - 1) // span
        s = int(np.searchsorted(counts, count, side="right")) - 1
        symbols.append(s)
        high = low + span * int(counts[s + 1]) // 65_536 - 1
        low = low + span * int(counts[s]) // 65_536
        while True:
            if high < 1 << 31:
                less = 0
            elif low >= 1 << 31:
                less = 1 << 31
            elif low >= 1 << 30 and high < 3 << 30:
                less = 1 << 30
            else:
                break
            low, high, value = 2 * (low - less), 2 * (high - less) + 1, 2 * (value - less)
            value += bits[at] if at < len(bits) else 0
            at += 1
    return symbols


def coded(section: Bytes, tables: list[NDArray[Any]], tokens: int, coder: str) -> NDArray[np.int64]:
    """Symbols `[C, T]`, column c with `tables[c]` (frequencies of 1,024)."""
    if tokens == 0:
        assert section == b""
        return np.empty((len(tables), 0), np.int64)
    segments, streams = read_streams(section, len(tables), tokens, 2 if coder == "rans" else 1)
    parts = []
    for length, own in zip(segments, streams, strict=True):
        if coder == "rans":
            parts.append([rans_stream(data, table, length) for data, table in zip(own, tables, strict=True)])
        else:
            counts = [64 * np.concatenate([[0], np.cumsum(table.astype(np.int64))]) for table in tables]
            parts.append([arithmetic_stream(data, count, length) for data, count in zip(own, counts, strict=True)])
    return np.concatenate([np.array(part) for part in parts], axis=1)


def decode(data: Bytes, profile: Bytes | None = None, coder: str = "rans") -> Floats:
    """The cache `[L, 2, T, H, D]`."""
    chunk = read_container(data)
    kv = READERS[chunk.codec](chunk, profile, coder)
    L, T, H, D = chunk.shape
    assert kv.shape == (L, 2, T, H, D)
    return kv


def kvstream(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    assert profile is not None
    if list(chunk.sections) == ["scal", "bits"]:
        return packed(chunk, 8)
    assert list(chunk.sections) == ["kind", "apar", "escs", "fine", "coef"]
    tensors, facts = read_profile(profile)
    L, T, H, D = chunk.shape
    expected = tensors["expected"][chunk.level]
    kinds = [(a + int(b)) % 256 for a, b in zip(inflate(chunk.sections["kind"]), expected, strict=True)]
    alive = [c for c in range(len(kinds)) if kinds[c]]
    classes = [int(tensors["kind_class"][kinds[c] - 1]) for c in alive]
    shifts = [int(tensors["kind_shift"][kinds[c] - 1]) for c in alive]
    steps = np.zeros((len(kinds), T))
    if alive:
        symbols = coded(chunk.sections["coef"], [tensors["tables"][k] for k in classes], T, "rans")
        points = tensors["values"].astype(np.float16).astype(np.float64)
        steps[alive] = np.take_along_axis(points[classes], symbols, axis=1)
    wide = [(c, k) for c, k in zip(alive, shifts, strict=True) if k]
    if wide:
        even = [np.array([1024 >> k] * (1 << k)) for _, k in wide]
        for (c, k), further in zip(wide, coded(chunk.sections["fine"], even, T, "rans"), strict=True):
            steps[c] = steps[c] * 2**k + further - 2 ** (k - 1)
    for column, token, value in escapes(chunk.sections["escs"]):
        steps[column, token] = value
    coefficients = steps * float(tensors["steps"][chunk.level])
    kv = np.empty((L, 2, T, H, D))
    each, first = facts["group_layers"], 0
    for group in range(-(-L // each)):
        layers = slice(each * group, min(each * (group + 1), L))
        basis = tensors[f"basis.{group}"].astype(np.float64) * tensors["scale"][layers, ..., None]
        own = coefficients[first : first + len(basis)]
        kv[layers] = np.tensordot(basis, own, (0, 0)).transpose(0, 1, 4, 2, 3)
        first += len(basis)
    kv += tensors["mean"][:, :, None]
    if "inv_freq" in tensors:
        half = tensors["inv_freq"].shape[1]
        for layer, pair, t in np.ndindex(L, half, T):
            i, j = (2 * pair, 2 * pair + 1) if facts["rope_interleaved"] else (pair, pair + half)
            angle = float(np.float32(chunk.start + t) * tensors["inv_freq"][layer, pair])
            x, y = kv[layer, 0, t, :, i].copy(), kv[layer, 0, t, :, j].copy()
            kv[layer, 0, t, :, i] = x * math.cos(angle) - y * math.sin(angle)
            kv[layer, 0, t, :, j] = x * math.sin(angle) + y * math.cos(angle)
    apart = chunk.sections["apar"]
    if apart:
        (count,) = struct.unpack_from("<I", apart)
        tokens = list(struct.unpack_from(f"<{count}I", apart, 4))
        kv[:, :, tokens] = floats(apart[4 + 4 * count :], chunk.dtype).reshape(L, 2, count, H, D)
    return kv


def inflate(data: Bytes) -> Bytes:
    reader = zlib.decompressobj()
    plain = reader.decompress(data)
    assert reader.eof
    assert reader.unused_data in (b"", b"\0")  # a zero makes the length even
    return plain


def escapes(section: Bytes) -> list[tuple[int, int, int]]:
    if not section:
        return []
    (count,) = struct.unpack_from("<I", section)
    plain = inflate(section[4:])
    assert len(plain) == 10 * count
    columns = np.cumsum(np.frombuffer(plain, "<u4", count))
    tokens, values = np.frombuffer(plain, "<u2", count, 4 * count), np.frombuffer(plain, "<i4", count, 6 * count)
    return list(zip(columns.tolist(), tokens.tolist(), values.tolist(), strict=True))


def cachegen(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    assert profile is not None
    tensors, _ = read_profile(profile)
    L, T, H, D = chunk.shape
    A = -(-T // 10)
    scale = (3.0, 2.0, 1.5, 1.0, 0.5)[chunk.level]
    anchor_scale = floats(chunk.sections["ascl"], chunk.dtype).reshape(L, 2, A)
    delta_scale = floats(chunk.sections["dscl"], chunk.dtype).reshape(L, 2, T - A)
    anchors = coded(chunk.sections["anch"], list(tensors["anchor"]), A, coder).reshape(L, 2, H * D, A)
    deltas = coded(chunk.sections["delt"], list(tensors[f"delta{chunk.level}"]), T - A, coder)
    deltas = deltas.reshape(L, 2, H * D, T - A)
    kv = np.empty((L, 2, T, H * D))
    for layer, side in np.ndindex(L, 2):
        bin_size = scale * (0.5, 1.0, 1.5)[3 * layer // L]
        n = math.floor(16 / bin_size + 0.5)
        d = 0
        for t in range(T):
            anchor = (anchors[layer, side, :, t // 10] - 127) * anchor_scale[layer, side, t // 10] / 127
            kv[layer, side, t] = anchor
            if t % 10:
                kv[layer, side, t] += (deltas[layer, side, :, d] - n) * (delta_scale[layer, side, d] * bin_size / 16)
                d += 1
    return kv.reshape(L, 2, T, H, D)


def artifact(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    L, T, H, D = chunk.shape
    scale = floats(chunk.sections["scal"], chunk.dtype).reshape(L, 2, T)
    counts = np.frombuffer(chunk.sections["cdfs"], "<u2").astype(np.int64).reshape(-1, 33)
    counts[:, 32] = 65_536
    lengths = np.frombuffer(chunk.sections["lens"], "<u4").reshape(-1, len(counts))
    symbols = np.empty((len(counts), T), np.int64)
    at = 0
    for segment, column in np.ndindex(*lengths.shape):
        string = chunk.sections["data"][at : at + int(lengths[segment, column])]
        first, last = 256 * segment, min(256 * (segment + 1), T)
        symbols[column, first:last] = arithmetic_stream(string, counts[column], last - first)
        at += len(string)
    assert at == len(chunk.sections["data"])
    bins = ((16, 16, 12), (32, 16, 16), (32, 32, 32))[chunk.level]
    n = np.array([bins[3 * layer // L] // 2 - 1 for layer in range(L)])[:, None, None, None]
    values = symbols.reshape(L, 2, H * D, T).transpose(0, 1, 3, 2) - n
    return (values / n * scale[..., None]).reshape(L, 2, T, H, D)


def uniform(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    return packed(chunk, (3, 4, 8)[chunk.level])


def packed(chunk: Chunk, b: int) -> Floats:
    L, T, H, D = chunk.shape
    scale = floats(chunk.sections["scal"], chunk.dtype).reshape(L, 2, T, 1, 1)
    block = -(-T * H * D // 8) * b
    values = np.empty((L, 2, T, H, D))
    for index, (layer, side) in enumerate(np.ndindex(L, 2)):
        part = chunk.sections["bits"][index * block : (index + 1) * block]
        values[layer, side] = packed_symbols(part, b, T * H * D).reshape(T, H, D)
    n = 2 ** (b - 1) - 1
    return (values - n) * scale / n


def e4m3(data: Bytes) -> Floats:
    every = np.arange(256)
    exponent, fraction = (every >> 3) & 15, every & 7
    sizes = np.where(exponent > 0, (1 + fraction / 8) * 2.0 ** (exponent - 7), fraction / 8 * 2.0**-6)
    return np.where(every >= 128, -sizes, sizes)[np.frombuffer(data, np.uint8)]


def fp8(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    L, T, H, D = chunk.shape
    values = e4m3(chunk.sections["data"]).reshape(L, 2, T, H, D)
    return values * floats(chunk.sections["scal"], "float32").reshape(L, 2, 1, H, 1)


def packed_symbols(part: Bytes, b: int, count: int) -> Floats:
    """Eight symbols in b bytes, the first in the lowest bits."""
    found: list[int] = []
    for first in range(0, len(part), b):
        packed = int.from_bytes(part[first : first + b], "little")
        found += [(packed >> (i * b)) & ((1 << b) - 1) for i in range(8)]
    return np.array(found[:count], np.float64)


def kivi(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    L, T, H, D = chunk.shape
    b = (2, 4)[chunk.level]
    exact = floats(chunk.sections["exac"], chunk.dtype).reshape(L, 2, -1, H, D)
    n = T - exact.shape[2]
    low, step = (floats(chunk.sections[tag], chunk.dtype) for tag in ("lows", "step"))
    kv = np.empty((L, 2, T, H, D))
    kv[:, :, n:] = exact
    size = -(-n * H * D // 8) * b
    at = 0
    for index, (layer, side) in enumerate(np.ndindex(L, 2)):
        symbols = packed_symbols(chunk.sections["bits"][index * size : (index + 1) * size], b, n * H * D)
        rows = symbols.reshape((n * H, D) if side else (H * D, n))
        for row in rows:
            for first in range(0, len(row), 32):
                row[first : first + 32] = row[first : first + 32] * step[at] + low[at]
                at += 1
        kv[layer, side, :n] = rows.reshape(n, H, D) if side else rows.reshape(H, D, n).transpose(2, 0, 1)
    return kv


def turned(keys: Floats, inv_freq: NDArray[np.float32], interleaved: bool, start: int) -> Floats:
    """Keys `[L, n, H, D]` of tokens from position `start` on, rotated."""
    L, n = keys.shape[:2]
    half = inv_freq.shape[1]
    found = keys.copy()
    for layer, pair, t in np.ndindex(L, half, n):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        angle = float(np.float32(start + t) * inv_freq[layer, pair])
        x, y = keys[layer, t, :, i], keys[layer, t, :, j]
        found[layer, t, :, i] = x * math.cos(angle) - y * math.sin(angle)
        found[layer, t, :, j] = x * math.sin(angle) + y * math.cos(angle)
    return found


def kvtc(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    assert profile is not None
    L, T, H, D = chunk.shape
    tensors, facts = read_profile(profile)
    exact = floats(chunk.sections["exac"], chunk.dtype).reshape(L, 2, -1, H, D)
    sinks = max(0, min(4 - chunk.start, T))
    n = T - exact.shape[2]
    kv = np.empty((L, 2, T, H, D))
    kv[:, :, :sinks], kv[:, :, sinks + n :] = exact[:, :, :sinks], exact[:, :, sinks:]
    for side, tag in enumerate(("keys", "vals")):
        data = zlib.decompress(chunk.sections[tag])
        basis = tensors[f"{tag}.basis"].astype(np.float64)
        rows = np.tile(tensors[f"{tag}.mean"].astype(np.float64), (n, 1))
        at = first = 0
        for size, b in tensors[f"{tag}.groups.{chunk.level}"].tolist():
            high, low = np.frombuffer(data[at : at + 4 * n], np.uint8).astype(np.uint16).reshape(2, 2, n)
            shift, scale = (256 * high + low).view(np.float16).astype(np.float64)
            at += 4 * n
            length = -(-n * size // 8) * b
            part = data[at : at + length]
            at += length
            symbols = e4m3(part)[: n * size] if b == 8 else packed_symbols(part, b, n * size)
            rows += (symbols.reshape(n, size) * scale[:, None] + shift[:, None]) @ basis[first : first + size]
            first += size
        assert at == len(data)
        values = rows.reshape(n, L, H, D).transpose(1, 0, 2, 3)
        if side == 0 and "inv_freq" in tensors:
            values = turned(values, tensors["inv_freq"], facts["rope_interleaved"], chunk.start + sinks)
        kv[:, side, sinks : sinks + n] = values
    return kv


def raw(chunk: Chunk, profile: Bytes | None, coder: str) -> Floats:
    L, T, H, D = chunk.shape
    return floats(chunk.sections["data"], chunk.dtype).reshape(L, 2, T, H, D)


READERS = {
    "kvstream": kvstream, "cachegen": cachegen, "artifact": artifact, "uniform": uniform, "fp8": fp8, "raw": raw,
    "kivi": kivi, "kvtc": kvtc,
}  # fmt: skip
