"""What the figures and the page are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What the figures are drawn from: rows that count, by scheme, and the summary over them."""

    summary: Json
    rows: Mapping[str, Sequence[Json]]
    levels: Mapping[str, Sequence[Json]]
    session: Json | None
    """The cell of the session to show as a timeline."""
