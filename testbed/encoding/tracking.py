"""How what takes minutes tells of its progress; `kvstream.testbed.run.progress` prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Say = Callable[[str], None]
"""Takes a line about what begins now."""
Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Yields the items of a sequence and reports progress, as `progress.track` does."""


def untracked(items: Sequence[Any], about: str) -> Iterable[Any]:
    """A `Track` without output."""
    return items
