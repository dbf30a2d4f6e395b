"""LMCache's L2 cache holds our chunks: a serde, and an adapter for values of any size. For LMCache 0.5.

    {"type": "plugin", "module_path": "kvstream.testbed.connectors.lmcache", "class_name": "FolderAdapter",
     "adapter_params": {"base_path": "/cache"}, "serde": {"type": "kvstream", "heads": 8, "profile": "model.profile"}}

LMCache imports an adapter's module before it makes the serde, so importing this one registers the serde. Its settings
are those of `keyed.KeyedCodec.of`, and

    heads           KV heads of the cache, 1 by default: LMCache keeps heads and their elements in one dimension
    chunk_tokens    LMCache's chunk size, 256 by default: a chunk begins at one of its multiples
    max_tokens      the longest sequence, 32768 by default

Neither a key nor the memory that comes with it says where a chunk begins, and a cache whose keys are not rotated back
takes several times the bytes: the position is found from the keys themselves (`kvstream.codec.kvstream.start`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiofiles
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory

from kvstream.codec.errors import CodecError
from kvstream.codec.layouts import from_lmcache
from kvstream.testbed.connectors.keyed import MARGIN_BYTES, KeyedCodec

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.memory_management import MemoryObj
    from torch import Tensor

SERDE = "kvstream"


class KVStreamSerializer(Serializer):
    """A chunk of the cache as a value of our codec."""

    def __init__(self, codec: KeyedCodec, heads: int, chunk_tokens: int, max_tokens: int) -> None:
        self._codec, self._heads = codec, heads
        self._starts = range(0, max_tokens, chunk_tokens)

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        value = self._codec.encode(_cache_of(src, self._heads), _bytes_of(key), None, self._starts)
        room = memoryview(dst.byte_array).cast("B")
        if len(value) > len(room):
            raise CodecError(f"a chunk takes {len(value)} bytes, and was to take at most {len(room)}")
        room[: len(value)] = value
        return len(value)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        sizes = zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        return sum(shape.numel() * dtype.itemsize for shape, dtype in sizes) + MARGIN_BYTES


class KVStreamDeserializer(Deserializer):
    """The inverse; LMCache takes what it raises for a chunk that is not there."""

    def __init__(self, codec: KeyedCodec, heads: int) -> None:
        self._codec, self._heads = codec, heads

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        self._codec.decode(memoryview(src.byte_array).cast("B"), _bytes_of(key), _cache_of(dst, self._heads))


class FolderAdapter(FSL2Adapter):
    """LMCache's files, one a chunk, but also those that are shorter than the buffer that a serde asks for."""

    def __init__(self, config: FSL2AdapterConfig, l1_memory_desc: object = None) -> None:
        if config.use_odirect:
            raise ValueError("use_odirect wants values of whole disk blocks; encoded chunks are not")
        super().__init__(config)

    async def _execute_load(self, keys: list[ObjectKey], objects: list[MemoryObj], task_id: int) -> None:
        loaded = Bitmap(len(keys))
        for index, (key, target) in enumerate(zip(keys, objects, strict=True)):
            room = memoryview(target.byte_array).cast("B")
            try:
                async with aiofiles.open(self._key_to_path(key), "rb") as file:
                    value = await file.read(len(room) + 1)
            except OSError:
                continue
            if len(value) <= len(room):
                room[: len(value)] = value
                loaded.set(index)
        if found := [keys[index] for index in loaded.get_indices_list()]:
            self._notify_keys_accessed(found)
        with self._lock:
            self._completed_load_tasks[task_id] = loaded
        self._load_efd.notify()


FolderAdapterConfig = FSL2AdapterConfig  # where LMCache looks for it


def make_serde(settings: dict[str, object]) -> AsyncSerdeProcessor:
    """From the settings of the serde. Raises SpecError or CodecError."""
    known = {"codec", "level", "profile", "model", "heads", "chunk_tokens", "max_tokens", "max_workers"}
    if unknown := settings.keys() - known:
        raise CodecError(f"the serde has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    codec = KeyedCodec.of(settings)
    heads = _count(settings, "heads", 1)
    serializer = KVStreamSerializer(
        codec, heads, _count(settings, "chunk_tokens", 256), _count(settings, "max_tokens", 32768)
    )
    return AsyncSerdeProcessor(serializer, KVStreamDeserializer(codec, heads), _count(settings, "max_workers", 1))


def _count(settings: dict[str, object], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CodecError(f"{name} is {value!r}; give a whole number above 0")
    return value


def _cache_of(memory: MemoryObj, heads: int) -> Tensor:
    """What an object holds as `[L, 2, T, H, D]`, a view."""
    layout: Any = memory.get_memory_format().name
    tensor = memory.tensor
    if tensor is None or layout != "KV_2LTD":
        raise CodecError(
            f"an object of format {layout} is not a cache of keys and values [2, layers, tokens, heads * dim]"
        )
    return from_lmcache(tensor, heads, layout)


def _bytes_of(key: ObjectKey) -> bytes:
    facts = (key.chunk_hash.hex(), key.model_name, key.kv_rank, key.object_group_id, key.cache_salt)
    return "\0".join(map(str, facts)).encode()


register_serde_factory(SERDE, make_serde)
