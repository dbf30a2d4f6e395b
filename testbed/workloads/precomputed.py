"""Precomputed data: manifests and measured compute times of the contexts that come with kvstream.

Made by `scripts/ship.py` from the bundled model; the simulator and the lab need neither torch nor the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.store.manifest import Manifest

FOLDER: Final = Path(__file__).parent / "data" / "precomputed"
CHUNK_TOKENS: Final = 256

FAMILY_RATES: Final = 0.4
"""Factor on the rates of the library's trace families, at which the levels of these contexts differ."""


@dataclass(frozen=True)
class Precomputed:
    """The manifest of a context under a codec, its compute costs, and the machine that they were measured on."""

    manifest: Manifest
    costs: Costs
    machine: Mapping[str, Any]


def load(context: str, codec: str) -> Precomputed | None:
    """The precomputed data of (context, codec spec); None if not shipped. Raises SpecError for a damaged file."""
    file = path_of(context, codec)
    if not file.is_file():
        return None
    try:
        body = json.loads(file.read_text())
        costs = body["costs"]
        return Precomputed(
            Manifest.from_json(body["manifest"]),
            Costs(
                tuple(tuple(row) for row in costs["decode_s"]),
                None if costs["recompute_s"] is None else tuple(costs["recompute_s"]),
                costs["prefill_s"],
            ),
            body["machine"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{file} is damaged ({error!r}); reinstall kvstream") from error


def path_of(context: str, codec: str) -> Path:
    """The file of (context, codec spec)."""
    return FOLDER / f"{context.replace('/', '-')}-{codec.replace(',', '-').replace('/', '-')}.json"
