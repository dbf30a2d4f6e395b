"""The work that a session gives to its driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from kvstream.policies.api import (
    LevelOrText,
)

PREFILL: Final = -1
"""The compute step after the last chunk: the prompt's prefill, which ends in the first token."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Request a chunk at a level (or its text)."""

    chunk: int
    level: LevelOrText
    bytes: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the transfer of a chunk; what arrived of it is waste."""

    chunk: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode a chunk that has arrived into the cache."""

    chunk: int
    level: int


@dataclass(frozen=True, slots=True)
class Recompute:
    """Compute a chunk's KV from its tokens; everything before it is in the cache."""

    chunk: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Run the prompt over the complete cache and emit the first token."""


Work: TypeAlias = Fetch | Cancel | Decode | Recompute | Prefill
