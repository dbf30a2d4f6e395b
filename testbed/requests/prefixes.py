"""A store with a context for every beginning of a prompt that requests may share, for receivers over a real link.

Chunks have the sizes of the workload's ladder to the byte, so that simulated requests fetch as much. All but their
headers is zeros: nothing decodes them (`timed_engine`), and on disk they are holes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from kvstream.codec import container
from kvstream.codec.container import Header
from kvstream.policies.api import TEXT
from kvstream.testbed.encoding.synthetic_store import VOCABULARY
from kvstream.testbed.host.machine import cache_dir
from kvstream.testbed.store import layout
from kvstream.testbed.store.store import Store, text_bytes
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS
from kvstream.testbed.workloads.synthetic import Workload

FORMAT: Final = 1


def prepare(
    workload: Workload, codecs: Sequence[str], chunk_tokens: int, most: int
) -> tuple[Store, Mapping[tuple[str, int], str]]:
    """The store, and [codec, blocks of 512 tokens]: the context's id, from 1 block to `most`."""
    store = Store(cache_dir() / "stores" / f"prefixes-v{FORMAT}-{workload.model}-{chunk_tokens}")
    ids = {}
    for codec in codecs:
        written: dict[str, tuple[os.PathLike[str], str]] = {}
        for blocks in range(most, 0, -1):  # the longest first: the others share its whole chunks
            key = _id(workload, codec, chunk_tokens, blocks)
            ids[codec, blocks] = key
            if store.fault(key):
                _write(store, key, workload, codec, chunk_tokens, blocks, written)
    return store, ids


def _id(workload: Workload, codec: str, chunk_tokens: int, blocks: int) -> str:
    facts = repr((workload.model, workload.kv, codec, chunk_tokens, workload.ladder(codec)))
    return f"{codec}-{blocks * BLOCK_TOKENS}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _write(
    store: Store, key: str, workload: Workload, codec: str, chunk_tokens: int, blocks: int,
    written: dict[str, tuple[os.PathLike[str], str]],
) -> None:  # fmt: skip
    """One context. `written` keeps [tokens of a chunk and level]: a file with its content, and its SHA-256."""
    manifest = replace(workload.manifest(str(blocks * BLOCK_TOKENS), codec, chunk_tokens), context=key)
    kv = manifest.kv
    fresh: dict[str, tuple[int, int, str]] = {}
    with store.draft(key) as draft:
        for index, chunk in enumerate(manifest.chunks):
            draft.put_chunk(index, TEXT, text_bytes([0] * chunk.tokens, VOCABULARY))
            for level, size in enumerate(chunk.sizes_bytes):
                part, place = draft.new_part(), f"{chunk.start}-{chunk.stop}-{level}"
                if place in written:
                    content, digest = written[place]
                    os.link(content, part)
                else:
                    header = Header(codec, level, chunk.start, kv.layers, chunk.tokens, kv.heads, kv.head_dim, kv.dtype)
                    data = _sized(header, size)
                    digest = hashlib.sha256(data).hexdigest()
                    part.write_bytes(data.rstrip(b"\0"))
                    os.truncate(part, size)
                    fresh[place] = index, level, digest
                draft.take(part, index, level, digest)
        draft.publish(manifest)
    for place, (index, level, digest) in fresh.items():
        written[place] = layout.chunk_path(store.path / "contexts" / key, index, level), digest


def _sized(header: Header, size: int) -> bytes:
    """A chunk of so many bytes."""
    around = len(container.pack(header, {"zero": bytes(size)})) - size
    return container.pack(header, {"zero": bytes(size - around)})
