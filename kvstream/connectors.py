"""Doors from our link into the caches of engines, under a short name: `from kvstream.connectors import huggingface`.

A connector's file imports its engine, so each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstream.testbed.connectors import huggingface as huggingface


def __getattr__(name: str) -> Any:
    place = f"kvstream.testbed.connectors.{name}"
    if name.startswith("_") or find_spec(place) is None:
        raise AttributeError(f"module 'kvstream.connectors' has no attribute {name!r}")
    return import_module(place)
