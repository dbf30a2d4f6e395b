"""What comes with kvstream already encoded and measured: manifests and compute times of the shipped contexts.

Made by `scripts/ship.py` from the bundled model; the simulator and the lab need neither torch nor the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from testbed.errors import SpecError
from testbed.manifest import Manifest
from testbed.session import Costs

FOLDER: Final = Path(__file__).with_name("offers")
CHUNK_TOKENS: Final = 256


@dataclass(frozen=True)
class Offer:
    """A context under a codec, what computing with it costs, and on what machine that was measured."""

    manifest: Manifest
    costs: Costs
    machine: Mapping[str, Any]


def load(context: str, codec: str) -> Offer | None:
    """The shipped offer of (context, codec spec); None if there is none."""
    file = path_of(context, codec)
    if not file.is_file():
        return None
    try:
        body = json.loads(file.read_text())
        costs = body["costs"]
        return Offer(
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
    """File of an offer."""
    return FOLDER / f"{context.replace('/', '-')}-{codec.replace(',', '-').replace('/', '-')}.json"
