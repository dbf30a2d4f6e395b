"""The input of the figures and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """Counted rows by scheme, and the summary over them."""

    summary: Json
    rows: Mapping[str, Sequence[Json]]
    levels: Mapping[str, Sequence[Json]]
    references: Mapping[str, Sequence[Json]]
    """Rows of the reference lines."""
    simulated: Json | None
    """The summary of the same experiment in the simulator, beside an emulated one."""
    problem: str
    """Why the run proves nothing: too many invalid units; empty where it does."""
    families: Mapping[str, Sequence[tuple[str, str]]]
    """Of a sweep: [what its schemes share]: (scheme, value) in order."""
    session: Json | None
    """The cell of the session to show as a timeline."""
