"""Codecs that compute on the CPU accept caches on a CUDA device, and write the same bytes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kvstream.codec import registry  # noqa: E402
from tests.codec.profiles import stored  # noqa: E402
from tests.codec.synthetic import synthetic_kv  # noqa: E402


@pytest.mark.parametrize("name", ["raw", "uniform", "fp8", "artifact", "cachegen"])
def test_caches_on_a_device_give_the_same_bytes(name: str) -> None:
    codec = registry.make(name, {}, stored(name) if name == "cachegen" else None)
    kv = synthetic_kv(3, 300, 2, 8, seed=3)
    for level in range(len(codec.levels)):
        data = codec.encode(kv, level, positions=range(300))
        assert codec.encode(kv.cuda(), level, positions=range(300)) == data
        out = torch.empty(kv.shape, dtype=kv.dtype, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            codec.decode(data, out)
            copy = out.cpu()  # on the stream that decoding must use
        assert torch.equal(copy, codec.decode(data))
