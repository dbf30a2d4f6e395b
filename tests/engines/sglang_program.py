"""Our HiCache backend made by SGLang's own factory, in the environment of `scripts/engines.sh sglang`.

    {"kv": FILE, "layout": NAME, "v1": bool, "damage": bool, "config": {...}}

Puts the cache `kv` `[L, 2, T, H, D]` of a safetensors file into pages of host memory in SGLang's layout, stores them,
wipes the memory, loads them again and answers which came, with the cache in `found.safetensors` in the folder. The pool
is a stand-in with SGLang's own views of a page (0.5.23, `pool_host/mha.py`), which cannot be imported without CUDA's
packages.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = 64


class Pool:
    """What a backend uses of `MHATokenToKVPoolHost`."""

    def __init__(self, layout: str, layers: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
        self.layout, self.page_size, self.dtype = layout, PAGE, dtype
        self.layer_num, self.head_num, self.head_dim = layers, heads, dim
        pages = tokens // PAGE
        self.kv_buffer = torch.zeros(
            {
                "layer_first": (2, layers, tokens, heads, dim),
                "page_first": (2, tokens, layers, heads, dim),
                "page_first_direct": (2, pages, layers, PAGE, heads, dim),
                "page_head": (2, pages, heads, PAGE, layers, dim),
            }[layout],
            dtype=dtype,
        )

    def page(self, index: int) -> Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + PAGE]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + PAGE]
        return self.kv_buffer[:, index // PAGE : index // PAGE + 1]

    def put(self, kv: Tensor) -> None:
        """Copy a cache `[L, 2, T, H, D]` in, as the engine would from its device."""
        order = {"page_first": (1, 2, 0, 3, 4), "page_head": (1, 3, 2, 0, 4)}.get(self.layout, (1, 0, 2, 3, 4))
        for start in range(0, kv.shape[2], PAGE):
            page = self.page(start)
            page.copy_(kv[:, :, start : start + PAGE].permute(order).reshape(page.shape))

    def cache(self) -> Tensor:
        """The inverse."""
        kv = self.kv_buffer
        if self.layout == "layer_first":
            return kv.transpose(0, 1)
        if self.layout == "page_first":
            return kv.permute(2, 0, 1, 3, 4)
        order = (0, 2, 1, 3, 4, 5) if self.layout == "page_first_direct" else (0, 4, 1, 3, 2, 5)
        return kv.permute(order).flatten(2, 3).transpose(0, 1)

    def get_data_page(self, index: Any, flat: bool = True) -> Tensor:
        return self.page(int(index)).flatten()

    def get_dummy_flat_data_page(self) -> Tensor:
        return torch.zeros((2, self.layer_num, PAGE, self.head_num, self.head_dim), dtype=self.dtype).flatten()

    def set_from_flat_data_page(self, index: int, data_page: Tensor) -> None:
        page = self.page(index)
        page.copy_(data_page.reshape(page.shape))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from safetensors.torch import load_file, save_file
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    def round_trip(command: dict[str, Any]) -> dict[str, Any]:
        kv = load_file(command["kv"])["kv"]
        layers, _, tokens, heads, dim = kv.shape
        storage = HiCacheStorageConfig(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
            enable_storage_metrics=False, is_page_first_layout="page" in command["layout"], model_name="tiny-kv",
            extra_config={
                "backend_name": "kvstream",
                "module_path": "kvstream.testbed.connectors.sglang",
                "class_name": "KVStreamHiCache",
                "interface_v1": int(command["v1"]),
                **command["config"],
            },
        )  # fmt: skip
        pool = Pool(command["layout"], layers, tokens, heads, dim, kv.dtype)
        backend = StorageBackendFactory.create_backend("dynamic", storage, pool)
        backend.register_mem_pool_host(pool)
        pool.put(kv)
        assert torch.equal(pool.cache(), kv)
        keys = [f"page-{index}" for index in range(tokens // PAGE)]
        indices = torch.arange(tokens)
        starts = [index * PAGE for index in range(len(keys))]
        # in two batches, as SGLang does: the second is told which pages come before
        half = len(keys) // 2
        if command["v1"]:
            for span in (slice(0, half), slice(half, None)):
                info = HiCacheStorageExtraInfo(prefix_keys=keys[: span.start])
                stored = backend.batch_set_v1(keys[span], indices[span.start * PAGE :], info)
                assert all(stored)
        else:
            assert backend.batch_set(keys, [pool.get_data_page(start) for start in starts])
        files = sorted(Path(command["config"]["folder"]).glob("*.page"))
        if command["damage"]:
            data = bytearray(files[0].read_bytes())
            data[len(data) // 2] ^= 1
            files[0].write_bytes(data)
        pool.kv_buffer.zero_()
        assert backend.batch_exists([*keys, "another"]) == len(keys)
        if command["v1"]:
            came = backend.batch_get_v1(keys, indices, None)
        else:
            pages = backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
            came = [page is not None for page in pages]
            for start, page in zip(starts, pages, strict=True):
                if page is not None:
                    pool.set_from_flat_data_page(start, page)
        save_file({"kv": pool.cache().contiguous()}, Path(command["config"]["folder"]) / "found.safetensors")
        missing = backend.get("another", pool.get_dummy_flat_data_page())
        sizes = [file.stat().st_size for file in files]
        backend.clear()
        return {"came": came, "missing": missing is None, "sizes": sizes, "cleared": not backend.exists(keys[0])}

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(round_trip(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
