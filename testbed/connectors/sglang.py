"""SGLang's HiCache keeps our chunks: a dynamic storage backend, one file a page. For SGLang 0.5.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvstream",
        "module_path": "kvstream.testbed.connectors.sglang", "class_name": "KVStreamHiCache", "interface_v1": 1,
        "folder": "/cache", "profile": "model.profile"}'

Further settings are those of `keyed.KeyedCodec.of`; `model` is the engine's own where that is a folder. With
`interface_v1` SGLang says which pages come before those that it stores, and so where they begin. What it leaves out is
found from the keys (`kvstream.codec.kvstream.start`), among the multiples of the page size below `max_tokens` (32768).

Tried through SGLang's own factory and host memory pool, not yet inside a running engine.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from kvstream.codec.errors import CodecError
from kvstream.testbed.connectors.keyed import KeyedCodec
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import write_whole

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
    from sglang.srt.mem_cache.pool_host import HostKVCache
    from torch import Tensor

log = logging.getLogger("kvstream.connectors")

_OWN: Final = {"folder", "max_tokens", "codec", "level", "profile", "model"}
_AXES: Final = {
    "layer_first": (1, 0, 2, 3, 4),
    "page_first": (2, 0, 1, 3, 4),
    "page_first_direct": (1, 0, 2, 3, 4),
    "page_head": (3, 0, 2, 1, 4),
}
"""[layout]: the dimensions of a page in host memory that are layers, keys and values, tokens, heads and head_dim."""


class KVStreamHiCache(HiCacheStorage):
    """Pages of a cache of keys and values, on one rank."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any]) -> None:
        settings = dict(storage_config.extra_config or {})
        if storage_config.is_mla_model:
            raise SpecError("this model keeps latents instead of keys and values: its pages cannot be encoded")
        if not isinstance(settings.get("folder"), str):
            raise SpecError("the backend's extra config needs folder: where pages are kept")
        self._folder = Path(settings["folder"])
        self._folder.mkdir(parents=True, exist_ok=True)
        self._max_tokens = int(settings.get("max_tokens", 32768))
        config = storage_config
        engines = {"model": config.model_name} if config.model_name and Path(config.model_name).is_dir() else {}
        self._codec = KeyedCodec.of(engines | {name: settings[name] for name in _OWN & settings.keys()})
        facts = (config.model_name, config.tp_rank, config.tp_size, config.pp_rank, config.pp_size)
        self._rank = "\0".join(map(str, facts))
        self._shape: tuple[int, ...] = ()
        self._axes: tuple[int, ...] = ()

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        super().register_mem_pool_host(mem_pool_host)
        pool = mem_pool_host
        if pool.layout not in _AXES:
            raise SpecError(f"host memory of layout {pool.layout}; choose from {', '.join(_AXES)}")
        self._axes = _AXES[pool.layout]
        whole = (pool.layer_num, 2, pool.page_size, pool.head_num, pool.head_dim)
        self._shape = tuple(whole[self._axes.index(axis)] for axis in range(5))

    # --- the interface of version 1: pages are places in the host's memory

    def batch_set_v1(
        self, keys: list[str], host_indices: Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        pool = self.mem_pool_host
        before = None if extra_info is None or extra_info.prefix_keys is None else len(extra_info.prefix_keys)
        return [
            self._set(
                key,
                pool.get_data_page(host_indices[index * pool.page_size]),
                None if before is None else (before + index) * pool.page_size,
            )
            for index, key in enumerate(keys)
        ]

    def batch_get_v1(
        self, keys: list[str], host_indices: Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        pool = self.mem_pool_host
        done = []
        for index, key in enumerate(keys):
            page = self.get(key, pool.get_dummy_flat_data_page())
            if page is not None:
                pool.set_from_flat_data_page(int(host_indices[index * pool.page_size]), page)
            done.append(page is not None)
        return done

    # --- the general interface: pages are flat tensors

    def set(
        self, key: str, value: Any | None = None, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> bool:
        return value is not None and self._set(key, value, None)

    def get(self, key: str, target_location: Any | None = None, target_sizes: Any | None = None) -> torch.Tensor | None:
        if target_location is None:
            return None
        try:
            value = self._path(key).read_bytes()
            self._codec.decode(memoryview(value), self._name(key), self._cache_of(target_location))
        except FileNotFoundError:
            return None
        except (OSError, CodecError) as error:
            log.warning("page %s: %s; it is computed again", key, error)
            return None
        return target_location

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        stored = [self.set(key, value) for key, value in zip(keys, values or [], strict=True)]
        return all(stored)

    def batch_get(
        self, keys: list[str], target_locations: Any | None = None, target_sizes: Any | None = None
    ) -> list[torch.Tensor | None]:
        return [self.get(key, target) for key, target in zip(keys, target_locations or [], strict=True)]

    def clear(self) -> None:
        for path in self._folder.glob("*.page"):
            path.unlink(missing_ok=True)

    def _set(self, key: str, page: Tensor, start: int | None) -> bool:
        if self.exists(key):
            return True
        kv = self._cache_of(page)
        try:
            value = self._codec.encode(kv, self._name(key), start, range(0, self._max_tokens, kv.shape[2]))
            write_whole(self._path(key), value)
        except (OSError, CodecError) as error:
            log.warning("page %s is not stored: %s", key, error)
            return False
        return True

    def _cache_of(self, page: Tensor) -> Tensor:
        """A flat page as `[L, 2, T, H, D]`, a view."""
        if not self._shape:
            raise SpecError("pages came before the host's memory pool was registered")
        return page.view(self._shape).permute(self._axes)

    def _name(self, key: str) -> bytes:
        return f"{self._rank}\0{key}".encode()

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(self._name(key)).hexdigest()}.page"
