from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstream.codec.errors import CodecError
from kvstream.codec.targets import (
    HuggingFaceTarget,
    LayeredTarget,
    LMCacheTarget,
    PagedTarget,
    StridedTarget,
    as_target,
)


def test_misfits_are_refused() -> None:
    layers = [(torch.zeros(1, 2, 16, 4), torch.zeros(1, 2, 16, 4))]
    with pytest.raises(CodecError, match="do not fit"):
        HuggingFaceTarget(layers, 10, 7)
    with pytest.raises(CodecError, match="unequal"):
        HuggingFaceTarget([*layers, (torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))], 0, 8)
    with pytest.raises(CodecError, match="more tokens"):
        HuggingFaceTarget(layers, 0, 7).dynamic_cache()
    with pytest.raises(CodecError, match="LMCache"):
        LMCacheTarget(torch.zeros(1, 2, 3, 10), 4)
    with pytest.raises(CodecError, match="KV tensor"):
        StridedTarget(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(CodecError, match="float16 or float32"):
        as_target(torch.zeros(1, 2, 4, 4, 4, dtype=torch.int32))
    blocks = [torch.zeros(2, 5, 16, 2, 4)]
    for table, match in (([0, 5], "blocks 0 to 4"), ([0, 0], "twice"), ([1], "do not fit"), ([], "blocks")):
        with pytest.raises(CodecError, match=match):
            PagedTarget(blocks, table, 0, 20)


def test_dtypes_that_no_cache_has_are_refused() -> None:
    """Decoding into integers would truncate every value."""

    def pair(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, 2, 16, 4, dtype=dtype, device=device), torch.zeros(1, 2, 16, 4, dtype=dtype)

    half, whole, integer = pair(torch.float16), pair(torch.float32), pair(torch.int32)
    with pytest.raises(CodecError, match=r"not torch.int32"):
        HuggingFaceTarget([integer], 0, 16)
    with pytest.raises(CodecError, match=r"one dtype and one device, not torch.float16 on cpu, torch.float32"):
        HuggingFaceTarget([half, whole], 0, 16)
    with pytest.raises(CodecError, match="on meta"):
        HuggingFaceTarget([pair(torch.float32, "meta")], 0, 16)
    with pytest.raises(CodecError, match=r"not torch.uint8"):
        PagedTarget([torch.zeros(2, 5, 16, 2, 4, dtype=torch.uint8)], [0], 0, 10)
    blocks = [torch.zeros(2, 5, 16, 2, 4, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    with pytest.raises(CodecError, match="one dtype"):
        PagedTarget(blocks, [0], 0, 10)
    with pytest.raises(CodecError, match="several elements at one address"):
        StridedTarget(torch.zeros(1, 2, 10, 2, 4).expand(3, 2, 10, 2, 4))
    for other in ([1, 2], {"layers": 3}):
        with pytest.raises(CodecError, match="cannot decode into a"):
            as_target(other)  # type: ignore[arg-type]


def test_float16_saturates() -> None:
    tensor = torch.zeros(1, 2, 1, 1, 2, dtype=torch.float16)
    StridedTarget(tensor).write(0, 1, torch.tensor([[[1e6, -1e6]]]))
    assert tensor[0, 1].flatten().tolist() == [65504.0, -65504.0]


def test_parts_of_a_layered_target_take_their_own_layers() -> None:
    parts = [torch.full((n, 2, 5, 2, 4), torch.nan) for n in (2, 1)]
    target = LayeredTarget([as_target(part) for part in parts])
    assert target.shape == (3, 2, 5, 2, 4)
    values = torch.randn(3, 2, 5, 2, 4)
    for layer, side in np.ndindex(3, 2):
        target.write(layer, side, values[layer, side])
    assert torch.equal(torch.cat(parts), values)
    assert [own for _, own in target.shares()] == [range(2), range(2, 3)]


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    one = torch.empty(1, 2, 5, 2, 4)
    for other in (torch.empty(1, 2, 6, 2, 4), one.half(), one.to("meta")):
        with pytest.raises(CodecError, match="the parts of a layered target differ in"):
            LayeredTarget([as_target(one), as_target(other)])
    with pytest.raises(CodecError, match="at least one"):
        LayeredTarget([])
