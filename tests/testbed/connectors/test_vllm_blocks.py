"""vLLM's blocks without vLLM: every element where it belongs, in the layout of GPUs and in packed ones."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.testbed.connectors.vllm_blocks import (  # noqa: E402
    PackedBlocks,
    Share,
    StridedBlocks,
    heads_of_rank,
    kernel_table,
)
from kvstream.testbed.errors import SpecError  # noqa: E402
from tests.testbed.connectors.packing import packed_update  # noqa: E402

L, H, D, BLOCK, N_BLOCKS = 2, 3, 8, 16, 12


def blocks_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> StridedBlocks | PackedBlocks:
    if kind == "packed":
        caches = [torch.zeros(N_BLOCKS, H, BLOCK, 2 * D, dtype=dtype) for _ in range(L)]
        return PackedBlocks(caches, [packed_update] * L)
    if kind == "blocks first":  # [B, L, N, H, C] in memory, as vLLM's BLNHC
        memory = torch.zeros(N_BLOCKS, L, BLOCK, H, 2 * D, dtype=dtype)
        return StridedBlocks([memory[:, layer].transpose(1, 2) for layer in range(L)])
    return StridedBlocks([torch.zeros(N_BLOCKS, H, BLOCK, 2 * D, dtype=dtype) for _ in range(L)])


KINDS = ("strided", "blocks first", "packed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind: str, dtype: torch.dtype) -> None:
    blocks = blocks_of(kind, dtype)
    table = [7, 2, 11, 5]
    kv = torch.randn(L, 2, 3 * BLOCK + 5, H, D).to(dtype)
    blocks.write(table, 0, kv[:, :, :20])
    blocks.write(table, 20, kv[:, :, 20:])
    assert torch.equal(blocks.read(table, kv.shape[2]), kv)
    assert torch.equal(blocks.read([7, 2], 17), kv[:, :, :17])
    unused = [block for block in range(N_BLOCKS) if block not in table]
    assert not any(bool(cache[unused].any()) for cache in blocks.caches)
    assert blocks.is_finite(table, 0, kv.shape[2])
    kv[1, 1, 30, 2, 3] = torch.nan
    blocks.write(table, 0, kv)
    assert not blocks.is_finite(table, 30, 1)
    assert blocks.is_finite(table, 31, kv.shape[2] - 31)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_strided_blocks_are_decoded_into_directly(kind: str) -> None:
    blocks = blocks_of(kind)
    kv = torch.randn(L, 2, 20, H, D).to(torch.bfloat16)
    target = blocks.target([3, 9], 5, 20)
    assert target is not None
    for layer in range(L):
        for side in (0, 1):
            target.write(layer, side, kv[layer, side])
    assert torch.equal(blocks.read([3, 9], 25)[:, :, 5:], kv)
    # element by element as vLLM's kernels read it: [block, head, slot, key then value]
    assert torch.equal(blocks.caches[1][9, 2, 3], torch.cat([kv[1, 0, 14, 2], kv[1, 1, 14, 2]]))


def test_a_place_learnt_is_the_place_written() -> None:
    """An update that loses an element, or mixes heads, is found out and not trusted."""

    def lossy(keys, values, cache, slots):
        packed_update(keys, values, cache, slots)
        cache[:, :, 0, 1] = 0

    def mixing(keys, values, cache, slots):
        packed_update(keys.flip(2), values, cache, slots)
        cache[:, 1] = cache[:, 1].roll(1, -1)

    for update, complaint in ((lossy, "single elements"), (mixing, "one after the other")):
        blocks = PackedBlocks([torch.zeros(2, H, BLOCK, 2 * D)], [update])
        with pytest.raises(SpecError, match=complaint):
            blocks.read([0], 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("table", "start", "tokens"), [([0, N_BLOCKS], 0, 4), ([-1], 0, 4), ([1, 1], 0, 4), ([0], 10, 7), ([0], -1, 2)]
)
def test_impossible_tables_are_refused(kind: str, table: list[int], start: int, tokens: int) -> None:
    with pytest.raises(CodecError):
        blocks_of(kind).write(table, start, torch.zeros(L, 2, tokens, H, D))


def test_other_caches_are_refused() -> None:
    with pytest.raises(SpecError, match="kv-cache-dtype"):
        StridedBlocks([torch.zeros(2, H, BLOCK, 2 * D, dtype=torch.uint8)])
    with pytest.raises(SpecError, match="equal caches"):
        StridedBlocks([torch.zeros(2, BLOCK, 2 * D)])


@given(heads=st.integers(1, 64), ranks=st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_ranks_hold_every_head_equally_often(heads: int, ranks: int) -> None:
    if max(heads, ranks) % min(heads, ranks):
        with pytest.raises(SpecError):
            heads_of_rank(heads, 0, ranks)
        return
    held = [head for rank in range(ranks) for head in heads_of_rank(heads, rank, ranks)]
    assert held == sorted(held)
    assert {held.count(head) for head in range(heads)} == {max(1, ranks // heads)}


def test_shares() -> None:
    kv = torch.arange(4 * 2 * 3 * 6 * 2).view(4, 2, 3, 6, 2)
    assert torch.equal(Share((1, 2), range(2, 4)).of(kv), kv[1:3, :, :, 2:4])
    assert torch.equal(Share((0, 3), range(6)).of(kv), kv[[0, 3]])
    assert Share((0, 1, 2, 3), range(6)).is_all(4, 6)
    assert not Share((0, 1, 2, 3), range(3)).is_all(4, 6)
    assert not Share((0, 1), range(6)).is_all(4, 6)


def test_kernel_blocks_divide_the_schedulers() -> None:
    assert kernel_table([3, 0], 64, 16) == [12, 13, 14, 15, 0, 1, 2, 3]
    assert kernel_table([3, 0], 16, 16) == [3, 0]
    with pytest.raises(SpecError, match="kernel blocks"):
        kernel_table([0], 16, 32)
