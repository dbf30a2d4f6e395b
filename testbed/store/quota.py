"""Room in a store: what is not used goes first.

A quota bounds the encoded chunks of all contexts together; profiles, which contexts share, do not count. It is kept
after every put: contexts go in the order of their last use, the one just put stays. A put is a use, and so is a
session, noted by senders at most once in TOUCH_S.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.layout import encodings
from kvstream.testbed.store.manifest import Manifest

log = logging.getLogger("kvstream.sender")

TOUCH_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Use:
    """What a context takes, and when it was used last (seconds since the epoch, by the store's clock)."""

    bytes: int
    last_s: float


class Bounded(Protocol):
    """What is asked of a store here."""

    @property
    def quota_bytes(self) -> int | None: ...

    def uses(self) -> Mapping[str, Use]: ...

    def remove(self, context: str) -> None: ...


def size_bytes(manifest: Manifest) -> int:
    """What a context takes."""
    return sum(size for _, size in encodings(manifest))


def admit(store: Bounded, manifest: Manifest) -> None:
    """Raises SpecError for a context that the quota has no room for, whatever else goes."""
    if store.quota_bytes is not None and (size := size_bytes(manifest)) > store.quota_bytes:
        raise SpecError(f"context {manifest.context!r} has {size} bytes, the store's quota is {store.quota_bytes}")


def evict(store: Bounded, keep: str) -> list[str]:
    """Remove the contexts used longest ago until the quota is kept; returns their ids."""
    if store.quota_bytes is None:
        return []
    uses = store.uses()
    excess = sum(use.bytes for use in uses.values()) - store.quota_bytes
    gone = []
    for context, use in sorted(uses.items(), key=lambda item: item[1].last_s):
        if excess <= 0:
            break
        if context != keep:
            store.remove(context)
            log.info("removed %s, to keep the quota of %d bytes", context, store.quota_bytes)
            gone.append(context)
            excess -= use.bytes
    return gone
