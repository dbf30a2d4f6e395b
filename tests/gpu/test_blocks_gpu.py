"""Contexts decoded straight into paged blocks on a CUDA device, in the layouts that vLLM has there.

vLLM itself is not needed: the blocks are tensors of its shape and strides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from aiohttp.test_utils import TestServer  # noqa: E402

from kvstream.testbed.connectors.vllm_blocks import Share, StridedBlocks  # noqa: E402
from kvstream.testbed.connectors.vllm_loads import Load, Loaded, Loader  # noqa: E402
from kvstream.testbed.net.sender import Sender  # noqa: E402
from tests.testbed.link import Link  # noqa: E402
from tests.testbed.pipeline import CONTEXT, LEVEL, TOKENS, Kitchen, damage, make  # noqa: E402

BLOCK, N_BLOCKS = 16, 64
WHOLE = TOKENS // BLOCK * BLOCK
TABLE = tuple(range(N_BLOCKS - 1, N_BLOCKS - 1 - WHOLE // BLOCK, -1))


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return make(tmp_path_factory.mktemp("store"), "cuda")


def blocks_of(kitchen: Kitchen, share: Share, layout: str) -> StridedBlocks:
    """`[blocks, heads, block_tokens, 2 * head_dim]` views of memory in one of vLLM's layouts."""
    layers, heads, both = len(share.layers), len(share.heads), 2 * kitchen.model.kv.head_dim
    sizes = {"L": layers, "B": N_BLOCKS, "H": heads, "N": BLOCK, "C": both}
    memory = torch.full([sizes[name] for name in layout], 77.0, dtype=torch.bfloat16, device="cuda")
    order = [layout.index(name) for name in "LBHNC"]
    return StridedBlocks(list(memory.permute(order)))


def load(
    kitchen: Kitchen, blocks: StridedBlocks, share: Share, *, skip: int = 0,
    change: Callable[[bytes], bytes] | None = None, ready: Callable[[], None] = lambda: None,
) -> Loaded:  # fmt: skip
    manifest = kitchen.store.manifest(CONTEXT)
    wanted = Load("request", manifest, TABLE, BLOCK, skip, WHOLE, f"fixed,level={LEVEL}", 30.0, time.time())

    async def scenario() -> Loaded:
        async with TestServer(Sender(kitchen.store).app()) as server, Link(server.port or 0) as link:
            loader = Loader(link.url, blocks, share)
            try:
                if change is not None:
                    link.change = change
                loader.begin(wanted, ready)
                async with asyncio.timeout(120):
                    while not (found := loader.take_finished()):
                        await asyncio.sleep(0.01)
                return found[0]
            finally:
                await asyncio.get_running_loop().run_in_executor(None, loader.close)

    return asyncio.run(scenario())


def check(kitchen: Kitchen, blocks: StridedBlocks, share: Share, first: int = 0) -> None:
    """What the CPU decodes from the same bytes, up to the last bit of bfloat16."""
    n = len(kitchen.store.manifest(CONTEXT).chunks)
    wanted = share.of(kitchen.decoded((LEVEL,) * n))[:, :, first:WHOLE].float()
    got = blocks.read(TABLE, WHOLE)[:, :, first:].float().cpu()
    rms = wanted.pow(2).mean(dim=2, keepdim=True).sqrt()
    allowed = torch.maximum(torch.finfo(torch.bfloat16).eps * wanted.abs(), rms * 2.0**-8)
    assert bool(((got - wanted).abs() <= allowed).all())


def whole(kitchen: Kitchen) -> Share:
    kv = kitchen.model.kv
    return Share(tuple(range(kv.layers)), range(kv.heads))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_chunks_are_decoded_into_blocks(kitchen: Kitchen, layout: str) -> None:
    share = whole(kitchen)
    blocks = blocks_of(kitchen, share, layout)
    assert blocks.target(TABLE, 0, 100).placement is not None, "kernels write directly"
    one = load(kitchen, blocks, share)
    assert "error" not in one.report
    assert one.failed_blocks == frozenset()
    check(kitchen, blocks, share)
    others = [block for block in range(N_BLOCKS) if block not in TABLE]
    assert all(bool((cache[others] == 77.0).all()) for cache in blocks.caches)


def test_a_rank_has_its_heads_and_an_own_prefix_stays(kitchen: Kitchen) -> None:
    share = Share(whole(kitchen).layers, range(2, 5))
    blocks = blocks_of(kitchen, share, "LBNHC")
    one = load(kitchen, blocks, share, skip=160)
    assert "error" not in one.report
    check(kitchen, blocks, share, first=160)
    assert all(bool((cache[list(TABLE[:10])] == 77.0).all()) for cache in blocks.caches)


def test_nothing_is_written_before_the_engine_is_ready(kitchen: Kitchen) -> None:
    """Steps that were launched before may still read what the blocks held."""
    share = whole(kitchen)
    blocks = blocks_of(kitchen, share, "LBHNC")
    seen: list[bool] = []

    def ready() -> None:
        time.sleep(0.5)
        seen.append(all(bool((cache == 77.0).all()) for cache in blocks.caches))

    assert "error" not in load(kitchen, blocks, share, ready=ready).report
    assert seen[0]
    check(kitchen, blocks, share)


def test_damage_leaves_whole_chunks_and_marks_the_rest(kitchen: Kitchen) -> None:
    share = whole(kitchen)
    blocks = blocks_of(kitchen, share, "LBHNC")
    one = load(kitchen, blocks, share, change=damage(1000))
    assert one.report["error"]
    failed = [index for index, block in enumerate(TABLE) if block in one.failed_blocks]
    assert failed == list(range(failed[0], len(TABLE)))
    good = failed[0] * BLOCK
    assert 0 < good <= 256
    n = len(kitchen.store.manifest(CONTEXT).chunks)
    wanted = kitchen.decoded((LEVEL,) * n)[:, :, :good].float()
    got = blocks.read(TABLE, good).float().cpu()
    assert bool(((got - wanted).abs() <= 0.01 * wanted.abs() + 0.01 * wanted.pow(2).mean().sqrt()).all())
