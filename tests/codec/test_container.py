from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec.container import MAX_EXPANSION, Arrival, Header, inspect, pack, parse, split
from kvstream.codec.errors import CodecError

HEADER = Header("raw", 3, 1024, 2, 8, 2, 4, "float16", "ab" * 32)
SECTIONS = {"data": b"x" * 512, "tabl": b"", "note": b"12345"}


def test_round_trip() -> None:
    data = pack(HEADER, SECTIONS)
    for form in (data, bytearray(data), memoryview(data), torch.frombuffer(bytearray(data), dtype=torch.uint8)):
        chunk = parse(form)
        assert chunk.header == HEADER
        assert {k: bytes(v) for k, v in chunk.sections.items()} == SECTIONS
    assert chunk.header.positions == range(1024, 1032)
    assert chunk.header.shape == (2, 2, 8, 2, 4)


def test_layout_is_the_documented_one() -> None:
    """Field by field with struct, as docs/bitstream.md describes it."""
    data = pack(HEADER, SECTIONS)
    assert data[:4] == b"KVST"
    assert tuple(data[4:8]) == (1, 3, 1, 0)
    assert data[8:24] == b"raw".ljust(16, b"\0")
    assert data[24:56] == bytes([0xAB]) * 32
    assert struct.unpack("<QIIIII", data[56:84]) == (1024, 2, 8, 2, 4, 3)
    assert struct.unpack("<4sIQ", data[84:100]) == (b"data", zlib.crc32(b"x" * 512), 512)
    end = 84 + 3 * 16
    assert struct.unpack("<I", data[end : end + 4])[0] == zlib.crc32(data[:end])
    assert data[end + 4 :] == b"x" * 512 + b"12345"


def test_inspect() -> None:
    data = pack(HEADER, SECTIONS)
    seen = inspect(data)
    assert seen["codec"] == "raw"
    assert seen["tokens"] == [1024, 1032]
    assert seen["sections"] == {"data": 512, "tabl": 0, "note": 5}
    assert seen["total_bytes"] == len(data)
    assert seen["bits_per_element"] == pytest.approx(8 * len(data) / 256)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"tokens": 1 << 31},
        {"layers": 5000},
        {"heads": 5000},
        {"head_dim": 1 << 20},
        {"start": 1 << 50},
        {"tokens": 65_536, "heads": 4096},
        {"codec_id": "naïve"},
    ],
)
def test_absurd_headers_are_refused(change: dict[str, int]) -> None:
    with pytest.raises((CodecError, UnicodeEncodeError)):
        parse(pack(replace(HEADER, **change), SECTIONS))


def test_shape_is_in_proportion_to_the_content() -> None:
    small = Header("raw", 0, 0, 1, 2 * MAX_EXPANSION // 16, 2, 4, "float32")
    assert small.elements == 2 * MAX_EXPANSION
    parse(pack(small, {"data": b"xy"}))
    with pytest.raises(CodecError, match="out of proportion"):
        pack(small, {"data": b"x"})


def test_two_to_the_forty_tokens() -> None:
    """The field holds 32 bits; whatever a forged header puts there is refused."""
    data = bytearray(pack(HEADER, SECTIONS))
    data[68:72] = b"\xff" * 4
    end = 84 + 3 * 16
    data[end : end + 4] = struct.pack("<I", zlib.crc32(data[:end]))
    with pytest.raises(CodecError, match="tokens"):
        parse(bytes(data))


def test_what_is_only_split_is_verified_section_by_section() -> None:
    data = bytearray(pack(HEADER, SECTIONS))
    data[-1] ^= 1
    chunk = split(bytes(data))
    *good, bad = chunk.sections
    assert chunk.verify(*good) is chunk
    for tags in ((bad,), ()):
        with pytest.raises(CodecError, match=f"section '{bad}' at offset .* is damaged"):
            chunk.verify(*tags)
    with pytest.raises(CodecError, match="is damaged"):
        parse(bytes(data))


def test_messages_say_what_is_wrong() -> None:
    data = bytearray(pack(HEADER, SECTIONS))
    with pytest.raises(CodecError, match="not an encoded chunk"):
        parse(b"\x80\x04\x95" + bytes(200))
    with pytest.raises(CodecError, match="format version 9"):
        parse(bytes(data[:4]) + b"\x09" + bytes(data[5:]))
    with pytest.raises(CodecError, match="section 'data' at offset 136 is damaged"):
        parse(bytes(data[:140]) + b"?" + bytes(data[141:]))
    with pytest.raises(CodecError, match="truncated: section 'note'"):
        parse(bytes(data[:-1]))
    with pytest.raises(CodecError, match="follow the end"):
        parse(bytes(data) + b"1")
    with pytest.raises(CodecError, match="uint8 tensor"):
        parse(torch.zeros(100))
    with pytest.raises(CodecError, match="not str"):
        parse("text")  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="contiguous bytes"):
        parse(memoryview(np.zeros((100, 3), np.uint8).T))
    for empty in (memoryview(np.empty((0, 3), np.uint8)), memoryview(b""), torch.empty(0, dtype=torch.uint8)):
        with pytest.raises(CodecError, match="truncated"):
            parse(empty)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, b"KVST\x01" + noise):
        with pytest.raises(CodecError):
            parse(data)


def test_adjacent_bytes_are_not_copied() -> None:
    data = pack(HEADER, {"data": b"x" * 400, "more": b"y" * 112})
    memory = np.frombuffer(bytes(8) + data + bytes(8), np.uint8).copy()
    whole = memoryview(memory.data)[8 : 8 + len(data)]
    together, apart = Arrival(), Arrival()
    for start, stop in ((0, 70), (70, 131), (131, 300), (300, len(data))):
        together.feed(whole[start:stop])
        apart.feed(memoryview(data[start:stop]))
    memory[8 + len(data) - 1] ^= 1  # seen through a view, not in a copy
    assert bytes(apart.part(0, len(data))) == data
    assert bytes(together.part(0, len(data))) == data[:-1] + bytes([data[-1] ^ 1])
    assert apart.finish().sections["more"] == b"y" * 112


def test_an_announced_size_is_enforced() -> None:
    """So that memory is allocated for what a manifest says, not for what a chunk claims."""
    data = pack(HEADER, SECTIONS)
    fitting = Arrival(len(data))
    fitting.feed(memoryview(data))
    assert fitting.finish().total_bytes == len(data)
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(CodecError, match=f"claims {len(data)} bytes, but {size} were announced"):
            Arrival(size).feed(memoryview(data)[:200])
