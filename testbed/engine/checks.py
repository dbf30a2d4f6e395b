"""What an engine checks of a manifest and a chunk before it takes memory or decodes."""

from __future__ import annotations

from typing import Final

from kvstream.codec import container
from kvstream.codec.errors import CodecError
from kvstream.policies.api import LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import Manifest

MAX_BYTES_PER_ELEMENT: Final = 8
MAX_OVERHEAD_BYTES: Final = 1 << 20


def check_sizes(manifest: Manifest) -> None:
    """Raise SpecError unless the sizes that a manifest claims are in proportion: memory is taken for them."""
    for index, chunk in enumerate(manifest.chunks):
        limit = MAX_BYTES_PER_ELEMENT * chunk.tokens * manifest.kv.elements_per_token + MAX_OVERHEAD_BYTES
        if max(*chunk.sizes_bytes, chunk.text_bytes) > limit:
            raise SpecError(f"context {manifest.context}: chunk {index} claims more than {limit} bytes; store it again")


def check_chunk(data: memoryview, start: int, level: LevelOrText) -> None:
    """Raise CodecError unless encoded bytes begin like those of the chunk at this position and of this level.

    Otherwise a sender could answer with a well-formed chunk of another place, and the cache would be silently wrong.
    """
    header = container.parse_header(data)
    if (header.start, header.level) != (start, level):
        raise CodecError(
            f"requested tokens from {start} at level {level}, got tokens from {header.start} at level {header.level}"
        )
