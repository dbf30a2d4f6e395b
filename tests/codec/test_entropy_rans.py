from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec.entropy import rans
from kvstream.codec.entropy.sections import join
from kvstream.codec.entropy.tables import Tables, column_counts, cross_entropy_bits, from_counts, laplace_family
from kvstream.codec.errors import CodecError

PROFILE = settings(deadline=None, max_examples=60)


def draw_symbols(tables: Tables, rows: np.ndarray, tokens: int, seed: int = 0) -> np.ndarray:
    """Symbols uint8 `[C, T]` distributed as each column's table says."""
    slots = np.random.default_rng(seed).integers(0, 1024, (len(rows), tokens))
    return tables.slots[rows[:, None], slots]


@st.composite
def coded(draw: st.DrawFn) -> tuple[Tables, np.ndarray, np.ndarray, int]:
    """Tables (some skewed or certain), one per column, symbols, and tokens per segment."""
    n_symbols = draw(st.sampled_from([1, 2, 3, 32, 33, 256]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    alpha = draw(st.sampled_from([0.01, 0.3, 10.0]))
    count = draw(st.sampled_from([1, 3, 300]))
    tables = from_counts(rng.multinomial(1000, rng.dirichlet(np.full(n_symbols, alpha), count)),
                         floor=draw(st.integers(0, 1)))  # fmt: skip
    columns, tokens = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    rows = rng.integers(0, count, columns)
    if draw(st.booleans()):
        symbols = tables.slots[rows[:, None], rng.integers(0, 1024, (columns, tokens))]
    else:  # the least likely symbols: as many words as there can be
        allowed = np.where(tables.frequencies > 0, tables.frequencies.astype(int), 9999)
        symbols = np.repeat(allowed.argmin(axis=1)[rows][:, None], tokens, axis=1).astype(np.uint8)
    return tables, rows, symbols, draw(st.integers(1, tokens))


@given(coded())
@PROFILE
def test_round_trip(case: tuple[Tables, np.ndarray, np.ndarray, int]) -> None:
    tables, rows, symbols, segment_tokens = case
    data = rans.encode(symbols, rows, tables, segment_tokens=segment_tokens)
    assert (rans.decode(data, rows, tables, *symbols.shape) == symbols).all()
    shifted = memoryview(b"?" + data)[1:]
    token_major = np.full(symbols.shape[::-1], 255, np.uint8)
    rans.decode(shifted, rows, tables, *symbols.shape, token_major.T, threads=1)
    assert np.array_equal(token_major.T, symbols)


@given(coded(), st.sampled_from(["float32", "float16", "bfloat16"]), st.data())
@PROFILE
def test_reconstruction_equals_arithmetic_on_the_symbols(
    case: tuple[Tables, np.ndarray, np.ndarray, int], dtype: str, data: st.DataObject
) -> None:
    torch = pytest.importorskip("torch")
    tables, rows, symbols, segment_tokens = case
    columns, tokens = symbols.shape
    rng = np.random.default_rng(columns * 1000 + tokens)
    groups = data.draw(st.sampled_from([g for g in range(1, columns + 1) if columns % g == 0]))
    blocks = data.draw(st.sampled_from([b for b in range(1, columns + 1) if columns % b == 0]))
    values = data.draw(
        st.sampled_from([
            np.arange(tables.symbols, dtype=np.float32)[None] - 16,
            rng.normal(size=(tables.count, tables.symbols)).astype(np.float32) * 1e-3,
            np.full((1, tables.symbols), 3e4, np.float32),
        ])
    )  # fmt: skip
    scale = rng.lognormal(size=columns).astype(np.float32)
    offset = rng.normal(size=columns).astype(np.float32)
    token_scale = rng.lognormal(size=(groups, tokens)).astype(np.float32)
    level = values[rows if len(values) > 1 else np.zeros(columns, int)][np.arange(columns)[:, None], symbols]
    expected = level * scale[:, None] + offset[:, None]
    expected = expected * np.repeat(token_scale, columns // groups, axis=0)
    reference = torch.from_numpy(expected.reshape(blocks, columns // blocks, tokens)).to(getattr(torch, dtype))
    target = torch.empty(blocks, columns // blocks, tokens, dtype=reference.dtype).transpose(1, 2)
    if data.draw(st.booleans()):
        target = target.contiguous()
    array = target.numpy() if dtype == "float32" else target.view(torch.uint16).numpy()
    packed = rans.encode(symbols, rows, tables, segment_tokens=segment_tokens)
    rans.decode_dequantised(packed, rows, tables, columns, tokens, array, values=values, scale=scale, offset=offset,
                            token_scale=token_scale, dtype=dtype)  # fmt: skip
    assert torch.equal(target.transpose(1, 2), reference)


def test_rounding_to_16_bits_agrees_with_torch() -> None:
    """Float32 bit patterns of every exponent, near and between representable values, into both 16-bit formats."""
    torch = pytest.importorskip("torch")
    tables = Tables(np.full((1, 256), 4))
    symbols = np.arange(256, dtype=np.uint8)[None]
    data = rans.encode(symbols, np.zeros(1, int), tables)
    rng = np.random.default_rng(0)
    ties = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    patterns = np.concatenate([ties, ties | 0x1000, ties | 0x8000, rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)])
    for part in np.where(np.isnan(patterns.view(np.float32)), 1, patterns).view(np.float32).reshape(-1, 256):
        for dtype in ("float16", "bfloat16"):
            out = np.empty((256, 1), np.uint16)
            rans.decode_dequantised(data, np.zeros(1, int), tables, 1, 256, out, values=part[None], dtype=dtype)
            # Adding an offset of 0 turns -0 into 0, as float arithmetic does.
            expected = torch.from_numpy(part + np.float32(0)).to(getattr(torch, dtype)).view(torch.uint16).numpy()
            assert (out[:, 0] == expected).all()


def test_segments_decode_alone_and_threads_agree() -> None:
    tables = laplace_family()
    rows = np.random.default_rng(0).integers(0, 20, 1600)
    symbols = draw_symbols(tables, rows, 300)
    one = rans.encode(symbols, rows, tables, segment_tokens=64, threads=1)
    assert one == rans.encode(symbols.T.copy().T, rows, tables, segment_tokens=64, threads=2)
    assert (rans.decode(one, rows, tables, 1600, 300, threads=2) == symbols).all()


@pytest.mark.parametrize(("tokens", "bound"), [(1024, 0.02), (256, 0.08)])
def test_size_over_the_entropy_of_its_own_model(tokens: int, bound: float) -> None:
    """At 1.2 bit per symbol and with the settings of the speed rows: header, lengths and final states included."""
    tables = laplace_family()
    per_table = (tables.frequencies / 1024 * np.where(tables.frequencies > 0, tables.cost_bits, 0)).sum(axis=1)
    rng = np.random.default_rng(3)
    rows = np.searchsorted(per_table, np.clip(rng.normal(1.2, 0.6, 4096), 0.1, 3))
    symbols = draw_symbols(tables, rows, tokens)
    ideal = cross_entropy_bits(column_counts(symbols, tables.symbols), rows, tables)
    assert 1.15 < ideal / symbols.size < 1.35
    assert 8 * len(rans.encode(symbols, rows, tables)) / ideal - 1 < bound


def test_columns_without_information_cost_no_words() -> None:
    tables = Tables(np.array([[1024, 0], [1020, 4]]))
    data = rans.encode(np.zeros((6400, 256), np.uint8), np.arange(6400) % 2, tables)
    assert len(data) < 6400 // 8


def corruptions(data: bytes, rng: np.random.Generator) -> list[bytes]:
    cut = int(rng.integers(0, len(data)))
    flipped = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        flipped[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    header = bytearray(data)
    at = int(rng.integers(0, min(len(data), 40)))
    header[at] = int(rng.integers(0, 256))
    return [data[:cut], data + bytes(rng.integers(1, 9)), bytes(flipped), bytes(header), rng.bytes(len(data))]


@given(coded(), st.integers(0, 2**32 - 1))
@PROFILE
def test_damage_is_an_error_or_harmless(case: tuple[Tables, np.ndarray, np.ndarray, int], seed: int) -> None:
    """Never a crash, a hang or a symbol outside the alphabet. The container's checksum catches what slips through."""
    tables, rows, symbols, segment_tokens = case
    data = rans.encode(symbols, rows, tables, segment_tokens=segment_tokens)
    for bad in corruptions(data, np.random.default_rng(seed)):
        try:
            out = rans.decode(bad, rows, tables, *symbols.shape)
        except CodecError:
            continue
        assert (out < tables.symbols).all()


def test_most_flipped_payload_bits_are_detected() -> None:
    """The stream has next to no redundancy, so the rest is for the container's checksum."""
    tables = laplace_family()
    rows = np.full(8, 20)
    data = rans.encode(draw_symbols(tables, rows, 200), rows, tables)
    noticed = 0
    bits = range(8 * 32, 8 * (len(data) - 2))
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            rans.decode(flipped, rows, tables, 8, 200)
        except CodecError:
            noticed += 1
    assert noticed > len(bits) / 2


def test_wrong_tables_are_detected() -> None:
    tables = laplace_family()
    rows = np.full(64, 12)
    data = rans.encode(draw_symbols(tables, rows, 200), rows, tables)
    with pytest.raises(CodecError, match="other tables"):
        rans.decode(data, rows + 1, tables, 64, 200)


def test_a_section_is_bound_to_its_tokens_and_segments() -> None:
    """Exhausted streams would yield the first slot's symbol for ever, and short segments many times their bytes."""
    tables = laplace_family()
    data = rans.encode(np.full((4, 90), 16, np.uint8), np.zeros(4, int), tables, segment_tokens=40)
    for tokens in (81, 89, 91, 120):
        with pytest.raises(CodecError, match="holds 90 tokens"):
            rans.parse(data, 4, tokens)
    assert rans.parse(data, 4, 90, 40).segments == 3
    for segment_tokens in (1, 39, 41, 90, 512):
        with pytest.raises(CodecError, match="segments of 40 tokens"):
            rans.parse(data, 4, 90, segment_tokens)


def test_blocks_of_columns_join_to_the_section_of_all() -> None:
    tables = laplace_family()
    rows = np.random.default_rng(0).integers(0, 20, 100)
    symbols = draw_symbols(tables, rows, 150)
    blocks = [
        rans.encode_streams(symbols[low:high], rows[low:high], tables, segment_tokens=64)
        for low, high in ((0, 1), (1, 33), (33, 100))
    ]
    assert join(blocks) == rans.encode(symbols, rows, tables, segment_tokens=64)


def test_lying_sizes_allocate_nothing() -> None:
    data = rans.encode(np.full((4, 8), 16, np.uint8), np.zeros(4, int), laplace_family())
    for columns, tokens in ((1 << 40, 1 << 40), (0, 8), (4, 0), (4, 1 << 39)):
        with pytest.raises(CodecError):
            rans.parse(data, columns, tokens)


def test_bad_arguments_are_refused() -> None:
    tables = laplace_family(4, 8)
    rows = np.zeros(4, int)
    symbols = np.full((4, 8), 4, np.uint8)
    data = rans.encode(symbols, rows, tables)
    with pytest.raises(CodecError, match="no slot"):
        rans.encode(np.full((4, 8), 200, np.uint8), rows, tables)
    with pytest.raises(CodecError, match="no slot"):
        rans.encode(np.zeros((4, 8), np.uint8), rows, Tables(np.array([[0, 1024]])))
    with pytest.raises(CodecError, match="names table"):
        rans.encode(symbols, rows + 4, tables)
    with pytest.raises(CodecError, match="segments"):
        rans.encode(symbols, rows, tables, segment_tokens=0)
    with pytest.raises(CodecError, match="uint8"):
        rans.encode(symbols.astype(np.int16), rows, tables)
    with pytest.raises(CodecError, match="out"):
        rans.decode(data, rows, tables, 4, 8, np.zeros((8, 4), np.uint8))
    for out, dtype in (
        (np.zeros((8, 4)), None),
        (np.zeros((8, 4), np.float32), "float16"),
        (np.zeros((8, 5), np.float32), None),
    ):
        with pytest.raises(CodecError):
            rans.decode_dequantised(data, rows, tables, 4, 8, out, dtype=dtype)
    backwards = np.zeros((8, 4), np.float32)[::-1]
    with pytest.raises(CodecError, match="strides"):
        rans.decode_dequantised(data, rows, tables, 4, 8, backwards)
