from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec.entropy import escapes
from kvstream.codec.entropy.tables import (
    PROB_SCALE,
    Tables,
    assign,
    column_counts,
    cross_entropy_bits,
    from_counts,
    laplace_family,
)
from kvstream.codec.errors import CodecError


@given(st.lists(st.lists(st.integers(0, 10**9), min_size=7, max_size=7), min_size=1, max_size=5), st.integers(0, 3))
def test_frequencies_sum_and_every_symbol_keeps_its_floor(counts: list[list[int]], floor: int) -> None:
    tables = from_counts(np.array(counts), floor=floor)
    assert (tables.frequencies.sum(axis=1) == PROB_SCALE).all()
    assert (tables.frequencies >= floor).all()
    assert (tables.frequencies[np.array(counts) > 0] > 0).all()


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any))
@settings(max_examples=20)
def test_rounding_is_optimal(counts: list[int]) -> None:
    """Against every way to give three symbols 1,024 slots."""
    best = np.inf
    histogram = np.array(counts, dtype=np.float64)
    a, b = np.meshgrid(np.arange(1, 1023), np.arange(1, 1023), indexing="ij")
    c = 1024 - a - b
    valid = c >= 1
    bits = sum(n * (10 - np.log2(f[valid])) for n, f in zip(histogram, (a, b, c), strict=True))
    best = bits.min()
    tables = from_counts(histogram)
    assert cross_entropy_bits(histogram[None], np.zeros(1, int), tables) == pytest.approx(best, rel=1e-9)


def test_slots_and_packed_entries_describe_the_same_partition() -> None:
    tables = laplace_family(8, 20)
    for k in range(tables.count):
        expected = list(itertools.chain.from_iterable([s] * int(f) for s, f in enumerate(tables.frequencies[k])))
        assert tables.slots[k].tolist() == expected
        packed = tables.packed[k]
        assert (packed & 255).tolist() == expected
        assert (((packed >> 8) & 2047) == tables.frequencies[k][expected]).all()
        assert ((packed >> 20) == np.arange(PROB_SCALE) - tables.starts[k][expected].astype(int)).all()


def test_family_of_32_loses_little_against_a_table_per_column() -> None:
    """Laplace columns of any scale in the family's range: within 0.03 bit of the exact distribution's entropy."""
    tables = laplace_family(32, 64)
    rng = np.random.default_rng(1)
    scales = np.geomspace(0.2, 8, 60)
    values = np.rint(rng.laplace(scale=scales[:, None], size=(60, 40_000))).astype(np.int64)
    symbols = np.clip(values + 32, 0, 63).astype(np.uint8)
    counts = column_counts(symbols, 64)
    p = counts / counts.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log2(p), axis=1)
    chosen = assign(counts, tables)
    for c in range(60):
        spent = (counts[c] * np.where(counts[c] > 0, np.minimum(tables.cost_bits[chosen[c]], 64), 0)).sum() / 40_000
        assert spent - entropy[c] < 0.03


def test_assign_prefers_the_table_with_fewest_bits_and_counts_escapes() -> None:
    tables = Tables(np.array([[1024, 0, 0], [1022, 1, 1], [342, 341, 341]]))
    counts = np.array([[1000, 0, 0], [1000, 3, 0], [10, 10, 10], [10**6, 1, 0]])
    assert assign(counts, tables).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "frequencies",
    [[[1000, 23]], [[512, 512], [1025, -1]], [[0.5, 0.5]], [1024], np.zeros((0, 4), int), np.full((1, 512), 2)],
)
def test_tables_refuse_what_is_not_a_distribution(frequencies: object) -> None:
    with pytest.raises(CodecError):
        Tables(np.array(frequencies))


@pytest.mark.parametrize("counts", [[[1.0, np.nan]], [[-1, 2]], np.ones((1, 257))])
def test_from_counts_refuses_what_is_not_a_histogram(counts: object) -> None:
    with pytest.raises(CodecError):
        from_counts(np.array(counts))


@given(st.data())
def test_escapes_restore_every_value(data: st.DataObject) -> None:
    tables = laplace_family(4, 15)
    columns, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    values = np.array(
        data.draw(st.lists(st.integers(-(2**15), 2**15 - 1) | st.integers(-9, 9), min_size=columns * tokens,
                           max_size=columns * tokens))
    ).reshape(columns, tokens)  # fmt: skip
    rows = np.array(data.draw(st.lists(st.integers(0, 3), min_size=columns, max_size=columns)))
    symbols, found = escapes.split(values, 7, rows, tables)
    assert (tables.frequencies[rows[:, None], symbols] > 0).all()
    back = symbols.astype(np.int32) - 7
    escapes.patch(back, escapes.parse(found.tobytes(), columns, tokens))
    assert (back == values).all()


def test_escapes_refuse_damage_and_overflow() -> None:
    tables = laplace_family(4, 15)
    _, found = escapes.split(np.array([[100, 0, -100]]), 7, np.zeros(1, int), tables)
    assert len(found) == 2
    data = found.tobytes()
    for bad, columns, tokens in ((data[:-1], 1, 3), (data, 1, 2), (data[8:] + data[:8], 1, 3), (data + data[8:], 1, 3)):
        with pytest.raises(CodecError):
            escapes.parse(bad, columns, tokens)
    with pytest.raises(CodecError, match="16 bits"):
        escapes.split(np.array([[40_000]]), 7, np.zeros(1, int), tables)


@given(st.integers(1, 40), st.integers(2, 256), st.sampled_from([0, 2e-5, 1e-3]))
@settings(max_examples=40, deadline=None)
def test_a_family_codes_consecutive_symbols_around_the_centre(classes: int, n_symbols: int, cut: float) -> None:
    tables = laplace_family(classes, n_symbols, cut=cut)
    for row in tables.frequencies:
        coded = np.flatnonzero(row)
        assert n_symbols // 2 in coded
        assert (np.diff(coded) == 1).all()
        assert cut > 0 or len(coded) == n_symbols
