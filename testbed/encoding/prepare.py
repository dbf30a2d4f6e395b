"""From the contexts and codecs of an experiment to a store that a sender can serve.

Stores are cached by everything they depend on (model, codec, profile, chunking, context), so the second run of an
experiment starts at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.codec import registry
from kvstream.testbed.config.build import codec_spec
from kvstream.testbed.encoding.encode import store_kv
from kvstream.testbed.encoding.tracking import Say, Track, untracked
from kvstream.testbed.host.machine import cache_dir
from kvstream.testbed.store import shift
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.manifest import Manifest, ladder
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads.contexts import Context, asked, find_contexts

if TYPE_CHECKING:
    from kvstream.codec.api import Codec
    from kvstream.codec.profile import Profile

FORMAT = 4
"""Version of what is stored; stores of other versions are ignored."""


@dataclass(frozen=True)
class Prepared:
    """A store that holds every context of an experiment under every codec."""

    path: Path | str
    """As `open_store` takes it."""
    model: str
    """Folder or name that the model was loaded from."""
    model_name: str
    ids: Mapping[tuple[str, str], str]
    """(context, codec) as the experiment names them -> context id in the store."""
    manifests: Mapping[tuple[str, str], Manifest]
    exact_right: Mapping[str, int]
    """[context]: correct answers over the exact cache."""
    workload: str = ""
    """A synthetic workload instead of a model: compute times come from its profile."""

    @property
    def receiver_arguments(self) -> list[str]:
        """Command-line arguments of a receiver process, besides the store."""
        codecs = dict.fromkeys(codec for _, codec in self.ids if ".py:" in codec)
        files = [argument for codec in codecs for argument in ("--codec", codec)]
        return [*(["--workload", self.workload] if self.workload else ["--model", self.model]), *files]


def default_store() -> Path:
    """Where `kvstream store` puts contexts and `kvstream serve` finds them, unless told otherwise."""
    return cache_dir() / f"store-v{FORMAT}"


def prepare(
    model_source: str, contexts: Sequence[str], codecs: Sequence[str], chunk_tokens: int, say: Say = lambda line: None,
    to: ContextStore | None = None, *, track: Track = untracked, profile: Profile | None = None, force: bool = False,
) -> Prepared:  # fmt: skip
    """A store with all contexts under all codecs, encoded where not cached: `to`, or one of the model's and these
    chunks' in the cache directory.

    A level's distortion is measured on text of the context's own kind. `profile` replaces the calibrated one of its
    codec; CodecError where it was calibrated for another model, unless `force`.

    Raises SpecError for unknown names, CodecError for bad settings.
    """
    from kvstream.testbed.encoding import calibrate, texts
    from kvstream.testbed.encoding.tokens import context_ids, question_ids
    from kvstream.testbed.engine.loading import bundled_model_path, load_model
    from kvstream.testbed.engine.model import calculate_kv

    for codec_text in codecs:
        codec_spec(codec_text)
    wanted = find_contexts(contexts)
    source = str(bundled_model_path()) if model_source == "bundled" else model_source
    model = load_model(source)
    store = to or Store(cache_dir() / "stores" / f"v{FORMAT}-{model.fingerprint[:16]}-{chunk_tokens}")
    ids: dict[tuple[str, str], str] = {}
    missing: list[tuple[Context, str, Codec, str]] = []
    for codec_text in codecs:
        codec = calibrate.make_codec(codec_text, model, say, track, profile=profile, force=force)
        for name, context in zip(contexts, wanted, strict=True):
            key = context_id(context, codec, chunk_tokens, model.fingerprint if to else "")
            ids[name, codec_text] = key
            if fault := store.fault(key, evaluation=True):
                if key in store.contexts():
                    say(f"{fault}: encoding it again")
                missing.append((context, codec_text, codec, key))
    for context, codec_text, codec, key in missing:
        say(f"encoding {context.name} with {codec_text}: {len(codec.levels)} levels")
        tokens = context_ids(model, context)
        kv = calculate_kv(model, tokens)
        kind = texts.kind_of(context.text)
        distortions = calibrate.distortions(model, codec, chunk_tokens, say, track, kind)
        store_kv(
            store, key, tokens, model, codec, chunk_tokens=chunk_tokens, distortions=distortions, measured_on=kind,
            kv=kv, questions=question_ids(model, context), passage=calibrate.passage(model), force=force,
        )  # fmt: skip
    exact = {name: store.exact_right(key) for (name, _), key in ids.items()}
    manifests = {pair: store.manifest(key) for pair, key in ids.items()}
    for line in shift.lines(manifests):
        say(line)
    return Prepared(store.path, source, model.name, ids, manifests, exact)


def context_id(context: Context, codec: Codec, chunk_tokens: int, model: str = "") -> str:
    """`docs-cachegen-1a2b3c4d5e6f`: readable, and unique by everything the encoding depends on; with the fingerprint of
    the model in a store of several models."""
    facts: dict[str, Any] = {
        "text": context.text.hex(),
        "codec": registry.identity(codec),
        "chunk_tokens": chunk_tokens,
    }
    if model:
        facts["model"] = model
    facts["questions"] = [[q.prompt.hex(), q.answer.hex()] for q in asked(context.questions)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return f"{context.name}-{codec.codec_id}-{digest}"


def clear() -> None:
    """Remove every prepared store and calibration."""
    shutil.rmtree(cache_dir(), ignore_errors=True)


def describe_levels(prepared: Prepared, codecs: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Every codec's levels for a run's manifest: name, distortion, bits per element, bytes of a context."""
    known = {codec: [m for (_, one), m in prepared.manifests.items() if one == codec] for codec in codecs}
    return {codec: ladder(manifests) for codec, manifests in known.items() if manifests}
