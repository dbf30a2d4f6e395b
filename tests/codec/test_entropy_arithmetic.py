from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec.entropy import arithmetic
from kvstream.codec.entropy.arithmetic import Cdfs
from kvstream.codec.entropy.tables import Tables, laplace_family
from kvstream.codec.errors import CodecError

PROFILE = settings(deadline=None, max_examples=60)


@st.composite
def coded(draw: st.DrawFn) -> tuple[Cdfs, np.ndarray, np.ndarray]:
    """CDFs (some extremely skewed), one row per column, and symbols: likely ones, or only the least likely."""
    n_symbols = draw(st.sampled_from([1, 2, 3, 32, 33, 256]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.sampled_from([1, 4]))
    p = rng.dirichlet(np.full(n_symbols, draw(st.sampled_from([0.01, 0.3, 10.0]))), count)
    cdfs = arithmetic.from_counts(rng.multinomial(1000, p))
    columns, tokens = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    rows = rng.integers(0, count, columns)
    if draw(st.booleans()):
        symbols = np.stack([rng.choice(n_symbols, tokens, p=p[k]) for k in rows])
    else:
        rarest = np.diff(cdfs.bounds.astype(int), axis=1).argmin(axis=1)
        symbols = np.repeat(rarest[rows][:, None], tokens, axis=1)
    return cdfs, rows, symbols.astype(np.uint8)


@pytest.fixture(scope="module")
def torchac() -> object:
    from kvstream.codec.entropy import torchac_reference

    try:
        torchac_reference.encode_streams(
            np.zeros((1, 1), np.uint8), np.zeros(1, int), Cdfs(np.zeros((1, 2), np.uint16))
        )
    except CodecError as error:
        pytest.skip(str(error))
    return torchac_reference


@given(coded(), st.data())
@PROFILE
def test_round_trip(case: tuple[Cdfs, np.ndarray, np.ndarray], data: st.DataObject) -> None:
    cdfs, rows, symbols = case
    segment_tokens = data.draw(st.integers(1, symbols.shape[1]))
    section = arithmetic.encode(symbols, rows, cdfs, segment_tokens=segment_tokens)
    assert np.array_equal(arithmetic.decode(section, rows, cdfs, *symbols.shape), symbols)
    token_major = np.full(symbols.shape[::-1], 255, np.uint8)
    arithmetic.decode(memoryview(b"?" + section)[1:], rows, cdfs, *symbols.shape, token_major.T, threads=1)
    assert np.array_equal(token_major.T, symbols)


@given(coded())
@settings(deadline=None, max_examples=25)
def test_every_stream_is_torchacs_byte_for_byte(torchac: object, case: tuple[Cdfs, np.ndarray, np.ndarray]) -> None:
    cdfs, rows, symbols = case
    section = arithmetic.encode(symbols, rows, cdfs)
    streams = arithmetic.parse(section, *symbols.shape)
    ours = [streams.units[a:b].tobytes() for a, b in zip(streams.offsets, streams.offsets[1:], strict=False)]
    assert ours == torchac.encode_streams(symbols, rows, cdfs)  # type: ignore[attr-defined]
    assert np.array_equal(torchac.decode_streams(ours, rows, cdfs, symbols.shape[1]), symbols)  # type: ignore[attr-defined]


def test_reconstruction_is_that_of_rans() -> None:
    """The two coders share it; rANS's is tested against plain arithmetic."""
    from kvstream.codec.entropy import rans

    tables = laplace_family(6, 20, cut=0)
    cdfs = arithmetic.from_tables(tables)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 6, 96)
    symbols = tables.slots[rows[:, None], rng.integers(0, 1024, (96, 130))]
    settings_ = {
        "values": rng.normal(size=(6, 20)).astype(np.float32),
        "scale": rng.lognormal(size=96).astype(np.float32),
        "offset": rng.normal(size=96).astype(np.float32),
        "token_scale": rng.lognormal(size=(2, 130)).astype(np.float32),
    }
    outputs = []
    for coder, model in ((rans, tables), (arithmetic, cdfs)):
        data = coder.encode(symbols, rows, model, segment_tokens=64)  # type: ignore[operator]
        out = np.empty((2, 130, 48), np.float32)
        outputs.append(coder.decode_dequantised(data, rows, model, 96, 130, out, **settings_))  # type: ignore[operator]
    assert np.array_equal(outputs[0], outputs[1])


@given(coded(), st.integers(0, 2**32 - 1))
@PROFILE
def test_damage_is_an_error_or_harmless(case: tuple[Cdfs, np.ndarray, np.ndarray], seed: int) -> None:
    cdfs, rows, symbols = case
    rng = np.random.default_rng(seed)
    data = arithmetic.encode(symbols, rows, cdfs)
    flipped = bytearray(data)
    flipped[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    for bad in (data[: int(rng.integers(0, len(data)))], data + b"\0", bytes(flipped), rng.bytes(len(data))):
        try:
            out = arithmetic.decode(bad, rows, cdfs, *symbols.shape)
        except CodecError:
            continue
        assert (out < cdfs.symbols).all()


def test_nine_of_ten_flipped_payload_bits_are_detected() -> None:
    cdfs = arithmetic.from_tables(laplace_family(cut=0))
    rows = np.full(8, 20)
    rng = np.random.default_rng(0)
    symbols = laplace_family(cut=0).slots[rows[:, None], rng.integers(0, 1024, (8, 200))]
    data = arithmetic.encode(symbols, rows, cdfs)
    first = 8 * (len(data) - 2 - int(arithmetic.parse(data, 8, 200).offsets[-1]))
    bits = range(first, 8 * (len(data) - 2))
    missed = 0
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            arithmetic.decode(flipped, rows, cdfs, 8, 200)
        except CodecError:
            continue
        missed += 1
    assert missed < len(bits) / 10


@pytest.mark.parametrize(
    "cumulative",
    [
        np.array([[0, 5, 5, 0]], np.uint16),
        np.array([[1, 5, 0]], np.uint16),
        np.array([[0, 5, 9]], np.uint16),
        np.array([[0, 5, 0]]),
        np.zeros((1, 1), np.uint16),
        np.zeros(3, np.uint16),
    ],
)
def test_cdfs_refuse_what_cannot_be_coded(cumulative: np.ndarray) -> None:
    with pytest.raises(CodecError):
        Cdfs(cumulative)


def test_bad_arguments_are_refused() -> None:
    cdfs = Cdfs(np.array([[0, 5, 0]], np.uint16))
    with pytest.raises(CodecError, match="outside its alphabet"):
        arithmetic.encode(np.full((1, 1), 2, np.uint8), np.zeros(1, int), cdfs)
    with pytest.raises(CodecError, match="names table"):
        arithmetic.encode(np.zeros((1, 1), np.uint8), np.ones(1, int), cdfs)
    with pytest.raises(CodecError):
        arithmetic.from_tables(Tables(np.array([[1024, 0]])))
    with pytest.raises(CodecError):
        arithmetic.from_counts(np.array([[-1.0, 2.0]]))


def test_the_lock_of_a_build_that_was_killed_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a build that goes on does."""
    pytest.importorskip("torch", reason="needs torch, from the extra [run]")
    from kvstream.codec.entropy import torchac_reference

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "torchac_backend" / "lock"
    lock.parent.mkdir(parents=True)
    build = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", build, str(lock)], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        threading.Timer(0.5, builder.kill).start()
        begun_s = time.monotonic()
        torchac_reference.await_build()
        assert time.monotonic() - begun_s > 0.4
    assert not lock.exists()
