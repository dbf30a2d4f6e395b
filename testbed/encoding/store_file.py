"""Caches from elsewhere into a store: `kvstream store --kv FILE`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstream.codec import registry
from kvstream.testbed.config.build import codec_spec
from kvstream.testbed.encoding.encode import store_cache
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.kv_file import read_kv_file

if TYPE_CHECKING:
    from torch import Tensor

    from kvstream.codec.api import Codec
    from kvstream.codec.profile import Profile

FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


def store_file(
    path: Path,
    model: str | None,
    codecs: Sequence[str],
    chunk_tokens: int,
    store: ContextStore,
    say: Callable[[str], None] = lambda line: None,
    *,
    profile: Profile | None = None,
    force: bool = False,
) -> dict[str, str]:
    """Encode the cache of a file (`kvstream.testbed.store.kv_file`) with each codec: `{codec: context id}`.

    `model` is a fingerprint, or the name or folder of the model that the cache is of; None takes what the file says.
    `profile` replaces the calibrated one of its codec. Raises SpecError; and CodecError for a cache that a codec
    refuses, and for a profile of another model, unless `force`.
    """
    found = read_kv_file(path)
    fingerprint = _fingerprint(model) if model else found.model
    if not fingerprint:
        raise SpecError(f"{path} does not say which model its cache is of; give it with --model FOLDER")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    ids: dict[str, str] = {}
    for text in codecs:
        codec = _codec(text, fingerprint, profile)
        facts = [content, fingerprint, codec.get_config(), chunk_tokens]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        key = ids[text] = f"{_name(path)}-{codec.codec_id}-{digest}"
        if store.fault(key) is None:
            continue
        say(f"encoding {path.name} with {text}: {len(codec.levels)} levels")
        distortions, measured_on = _distortions(fingerprint, codec, chunk_tokens, found.kv, say)
        store_cache(
            store, key, found.token_ids, found.kv, codec, model=fingerprint, vocabulary=max(found.token_ids) + 1,
            chunk_tokens=chunk_tokens, distortions=distortions, measured_on=measured_on, force=force,
        )  # fmt: skip
    return ids


def _name(path: Path) -> str:
    """A file's name as a part of a context's id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "cache"


def _fingerprint(model: str) -> str:
    if FINGERPRINT.fullmatch(model):
        return model
    from kvstream.testbed.engine.loading import fingerprint_of

    return fingerprint_of(model)


def _codec(text: str, fingerprint: str, profile: Profile | None) -> Codec:
    """A codec, with this profile if it is of that codec, else with the one that is here for the model. Raises SpecError
    where it needs one that is not."""
    from kvstream.testbed.encoding import calibrate

    name, settings = codec_spec(text)
    if not registry.codec_class(name).needs_profile:
        return registry.make(name, settings)
    if profile is None or profile.codec_id != name:
        profile = calibrate.existing_profile(name, fingerprint)
        if profile is None:
            raise SpecError(
                f"codec {name} is not calibrated for model {fingerprint[:12]} here: run kvstream codec calibrate MODEL "
                "--codec " + name + ", or take one that needs none: --codec uniform"
            )
    return registry.make(name, settings, profile)


def _distortions(
    fingerprint: str, codec: Codec, chunk_tokens: int, kv: Tensor, say: Callable[[str], None]
) -> tuple[tuple[float, ...], str | None]:
    """The levels' distortions as measured for the model, if that was done here, and the text; else the errors of this
    very cache."""
    from kvstream.testbed.encoding import calibrate

    measured = calibrate.existing_distortions(fingerprint, codec, chunk_tokens)
    if measured is not None:
        return measured, "check"
    say("no distortion (KL) was measured for this model here: levels are ranked by the relative squared error")
    exact = kv.float()
    power = float(exact.square().sum()) or 1.0
    errors = tuple(
        float((calibrate.round_trip(codec, kv, level, chunk_tokens).float() - exact).square().sum()) / power
        for level in range(len(codec.levels))
    )
    return errors, None
