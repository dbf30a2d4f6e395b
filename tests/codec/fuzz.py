"""Fuzz the container, the profiles and every decoder.

    python -m tests.codec.fuzz [SECONDS]                        random mutations, nothing to install
    python -m tests.codec.fuzz --atheris [libFuzzer options]    guided by coverage (pip install atheris)

One input is a codec, a way to harm a chunk that it wrote, and the bytes for that. Checksums are made right again, so
that what lies behind them is reached. Whatever comes out must be a `CodecError` or finite values; anything else, a
crash or a hang included, is a finding. So is more than a gigabyte of memory, of which there is no more to have.
"""

from __future__ import annotations

import itertools
import random
import resource
import struct
import sys
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

if "--atheris" in sys.argv:
    import atheris  # type: ignore[import-not-found]

    # Numba cannot compile instrumented functions.
    with atheris.instrument_imports(
        include=["kvstream.codec"],
        exclude=["kvstream.codec.quantize", "kvstream.codec.kvstream.kinds", "kvstream.codec.entropy"],
    ):
        from kvstream.codec import artifact, cachegen, container, kivi, kvtc, profile, raw, registry, uniform  # noqa: F401
        from kvstream.codec.kvstream import codec  # noqa: F401

from kvstream.codec import container, registry
from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from tests.codec.conformance import D, H, L
from tests.codec.profiles import stored
from tests.codec.synthetic import synthetic_kv

CODECS = ("raw", "uniform", "fp8", "artifact", "cachegen", "cachegen-ac", "kivi", "kvtc", "kvstream", "kvstream-8")
TOKENS = 21


@cache
def codec_of(name: str) -> Codec:
    base, _, coder = name.partition("-")
    cls = registry.codec_class(base)
    settings = {"coder": coder} if coder == "ac" else {}
    return registry.make(base, settings, stored(base) if cls.needs_profile else None)


@cache
def chunk_of(name: str, level: int) -> bytes:
    """With escapes, and in `kvstream` a token apart; `kvstream-8` is coded without the transform."""
    kv = synthetic_kv(L, TOKENS, H, D, seed=5)
    kv[1, 0, 3] *= 50
    start = 7
    if name.startswith("kvstream"):
        kv[1, 0, 3] /= 10
        start = 1  # the second of two sinks
    if name == "kvstream-8":
        kv *= 1e4
    return codec_of(name).encode(kv, level, positions=range(start, start + TOKENS))


def one_input(data: bytes) -> None:
    """Raise for a finding; return for everything as expected."""
    if len(data) < 4:
        return
    choice, how, level, rest = data[0], data[1], data[2], data[3:]
    if how % 5 == 4:
        fuzz_profile(choice, rest)
        return
    name = CODECS[choice % len(CODECS)]
    codec = codec_of(name)
    whole = chunk_of(name, level % len(codec.levels))
    harmed = {0: replaced, 1: sections_harmed, 2: header_forged, 3: bytes_harmed}[how % 5](whole, rest)
    out = torch.empty((L, 2, TOKENS, H, D))
    for target in (out, None):
        try:
            decoded = codec.decode(harmed, target)
        except CodecError:
            continue
        assert isinstance(decoded, torch.Tensor)
        if not codec.lossless and not bool(torch.isfinite(decoded).all()):
            raise AssertionError(f"{name} decoded values that are not finite")


def replaced(_: bytes, rest: bytes) -> bytes:
    """The input itself, bare and after a magic number."""
    return rest if rest[:1] < b"\x80" else b"KVST\x01" + rest


def bytes_harmed(whole: bytes, rest: bytes) -> bytes:
    harmed = bytearray(whole)
    for place, value in struct.iter_unpack("<HB", rest[: len(rest) // 3 * 3]):
        harmed[place % len(harmed)] = value
    return bytes(harmed)


def sections_harmed(whole: bytes, rest: bytes) -> bytes:
    """Content of sections changed, cut or replaced, with the right checksums."""
    chunk = container.parse(whole)
    sections = {tag: bytearray(content) for tag, content in chunk.sections.items()}
    tags = sorted(sections)
    packed = unpacked(sections)
    for which, place, value in struct.iter_unpack("<BHB", rest[: len(rest) // 4 * 4]):
        content = sections[tags[which % len(tags)]]
        match which // 32:
            case 7:
                del content[place % (len(content) + 1) :]
            case 6:
                content.extend(bytes([value]) * (place % 64))
            case 5:
                content[: place % 64] = bytes([value]) * (place % 64)
            case _ if content:
                content[place % len(content)] = value
    for tag, head in packed.items():
        if rest[:1] < b"\xc0":  # else compressed bytes that are not
            sections[tag][head:] = zlib.compress(bytes(sections[tag][head:]), 1)
    try:
        return container.pack(chunk.header, {tag: bytes(content) for tag, content in sections.items()})
    except CodecError:
        return b""


def unpacked(sections: dict[str, bytearray]) -> dict[str, int]:
    """Undo the compression of what sections hold, to reach what lies behind; where it begins in each."""
    found = {tag: head for tag, head in (("kind", 0), ("escs", 4)) if len(sections.get(tag, b"")) > head}
    for tag, head in found.items():
        sections[tag][head:] = zlib.decompressobj().decompress(sections[tag][head:])
    return found


def header_forged(whole: bytes, rest: bytes) -> bytes:
    """Header and section table changed, with the right checksum."""
    forged = bytearray(whole)
    n_sections = struct.unpack_from("<I", forged, 80)[0]
    end = 84 + 16 * n_sections
    for place, value in struct.iter_unpack("<BB", rest[: len(rest) // 2 * 2]):
        forged[4 + place % (end - 4)] = value
    if struct.unpack_from("<I", forged, 80)[0] == n_sections:
        struct.pack_into("<I", forged, end, zlib.crc32(forged[:end]))
    return bytes(forged)


def fuzz_profile(choice: int, rest: bytes) -> None:
    """A profile with changed tensors or bytes: refused, or a codec that still raises only CodecError."""
    name = ("cachegen", "kvstream", "kvtc")[choice % 3]
    good = stored(name)
    try:
        if choice & 4:
            Profile.from_bytes(bytes_harmed(good.to_bytes(), rest))
            return
        tensors = {key: array.copy() for key, array in good.tensors.items()}
        keys = sorted(tensors)
        for which, place, value in struct.iter_unpack("<BHB", rest[: len(rest) // 4 * 4]):
            flat = tensors[keys[which % len(keys)]].view(np.uint8).ravel()
            flat[place % len(flat)] = value
        codec = registry.make(name, {}, Profile(tensors, good.metadata))
        kv = synthetic_kv(L, TOKENS, H, D, seed=5)
        level = choice % len(codec.levels)
        codec.decode(codec.encode(kv, level, positions=range(TOKENS)))
    except CodecError:
        return


def absurd_claims() -> int:
    """Every codec's chunks with headers that claim absurd shapes, checksums right: how many of them were refused."""
    refused = 0
    shapes = (1, 7, 4_096, 65_535, 65_536, (1 << 32) - 1)
    for name in CODECS:
        whole = chunk_of(name, 0)
        for claim in itertools.product((None, *shapes), repeat=4):
            forged = bytearray(whole)
            for index, value in enumerate(claim):
                if value is not None:
                    struct.pack_into("<I", forged, 64 + 4 * index, value)
            if forged == whole:
                continue
            end = 84 + 16 * struct.unpack_from("<I", forged, 80)[0]
            struct.pack_into("<I", forged, end, zlib.crc32(forged[:end]))
            try:
                codec_of(name).decode(bytes(forged))
            except CodecError:
                refused += 1
    return refused


def limit_memory(further_bytes: int) -> None:
    """Let this process allocate this much more address space; beyond that, allocations fail."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + further_bytes, resource.RLIM_INFINITY))


def random_input(draw: random.Random) -> bytes:
    return draw.randbytes(3 + draw.choice((1, 2, 3, 4, 8, 16, 64, 300)))


def main() -> None:
    if "--absurd" in sys.argv:
        for name in CODECS:
            codec_of(name).decode(chunk_of(name, 0))
        limit_memory(64 << 20)
        print(absurd_claims())
        return
    if "--atheris" in sys.argv:
        sys.argv.remove("--atheris")
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
        return
    limit_memory(1 << 30)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    draw = random.Random(time.time_ns())
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = random_input(draw)
        try:
            one_input(data)
        except BaseException:
            print(f"finding: {data.hex()}")
            raise
        done += 1
    print(f"{done} inputs, no finding")


if __name__ == "__main__":
    main()
