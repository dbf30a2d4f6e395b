"""From contexts and codecs as named in an experiment to a store that a sender can serve.

Everything is kept in a cache and found again by what it was made of (model, codec, profile, chunking, context), so
the second run of an experiment starts at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import workload
from testbed.errors import SpecError
from testbed.machine import cache_dir
from testbed.manifest import Manifest
from testbed.plugs import codec_spec
from testbed.store import Store, store_evaluation, store_kv

if TYPE_CHECKING:
    from codec.api import Codec

FORMAT = 3
"""Counts changes of what is stored, so that old caches are left alone."""

MOST_QUESTIONS = 16
"""Every session asks them all after its first token, which takes a while on two cores."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A store that holds every context of an experiment under every codec."""

    path: Path
    model: str
    """Folder or name the model was loaded from."""
    model_name: str
    ids: Mapping[tuple[str, str], str]
    """(context, codec) as the experiment names them -> context id in the store."""
    manifests: Mapping[tuple[str, str], Manifest]
    exact_right: Mapping[str, int]
    """[context]: questions answered right over the exact cache."""
    workload: str = ""
    """A synthetic workload instead of a model: compute takes the times of its profile."""

    @property
    def receiver_arguments(self) -> list[str]:
        """What a receiver process is started with, beside the store."""
        return ["--workload", self.workload] if self.workload else ["--model", self.model]


def find_contexts(names: Sequence[str]) -> list[workload.Context]:
    """Contexts by the name of a shipped one or the path of a JSON file. Raises SpecError naming the shipped ones."""
    shipped = {context.name: context for context in workload.load_contexts()}
    found = []
    for name in names:
        if name in shipped:
            found.append(shipped[name])
        elif Path(name).is_file():
            try:
                found.append(workload.Context.from_json(Path(name).read_text(encoding="utf-8"), name))
            except UnicodeDecodeError as error:
                raise SpecError(f"{name}: not a context, which is JSON in UTF-8 ({error})") from None
        else:
            raise SpecError(f"no context is called {name!r}; there are {', '.join(shipped)}, or give a JSON file")
    return found


def prepare(
    model_source: str, contexts: Sequence[str], codecs: Sequence[str], chunk_tokens: int, say: Say = lambda line: None
) -> Prepared:
    """Encode what is not in the cache yet. Raises SpecError for unknown names, CodecError for bad settings."""
    from testbed import calibrate
    from testbed.llm import Model, Question, bundled_model_path, calculate_kv

    for codec_text in codecs:
        codec_spec(codec_text)
    wanted = find_contexts(contexts)
    source = str(bundled_model_path()) if model_source == "bundled" else model_source
    model = Model.load(source)
    store = Store(cache_dir() / "stores" / f"v{FORMAT}-{model.fingerprint[:16]}-{chunk_tokens}")
    ids: dict[tuple[str, str], str] = {}
    missing: list[tuple[workload.Context, str, Codec, str]] = []
    for codec_text in codecs:
        codec = calibrate.make_codec(codec_text, model, say)
        for name, context in zip(contexts, wanted, strict=True):
            key = context_id(context, codec, chunk_tokens)
            ids[name, codec_text] = key
            if key not in store.contexts():
                missing.append((context, codec_text, codec, key))
    for context, codec_text, codec, key in missing:
        say(f"encoding {context.name} with {codec_text}: {len(codec.levels)} levels")
        tokens = model.encode(context.text.decode())
        kv = calculate_kv(model, tokens)
        distortions = calibrate.distortions(model, codec, chunk_tokens, say)
        store_kv(store, key, tokens, model, codec, chunk_tokens=chunk_tokens, distortions=distortions, kv=kv)
        questions = [
            Question(tuple(model.encode(q.prompt.decode())), tuple(model.encode(q.answer.decode())))
            for q in asked(context.questions)
        ]
        right = store_evaluation(store, key, model, kv, questions, calibrate.passage(model))
        (store.path / "contexts" / key / "evaluation" / "exact.json").write_text(json.dumps(sum(right)))
    exact = {
        name: json.loads((store.path / "contexts" / key / "evaluation" / "exact.json").read_text())
        for (name, _), key in ids.items()
    }
    manifests = {pair: store.manifest(key) for pair, key in ids.items()}
    return Prepared(store.path, source, model.name, ids, manifests, exact)


def asked(questions: Sequence[workload.Question]) -> Sequence[workload.Question]:
    """The questions that are asked of a context: at most MOST_QUESTIONS, spread over all of it."""
    step = max(1, -(-len(questions) // MOST_QUESTIONS))
    return questions[::step]


def context_id(context: workload.Context, codec: Codec, chunk_tokens: int) -> str:
    """`docs-cachegen-1a2b3c4d5e6f`: readable, and unique by everything the encoding depends on."""
    facts = {"text": context.text.hex(), "codec": codec.get_config(), "chunk_tokens": chunk_tokens}
    facts["questions"] = [[q.prompt.hex(), q.answer.hex()] for q in asked(context.questions)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return f"{context.name}-{codec.codec_id}-{digest}"


def clear() -> None:
    """Remove every prepared store and calibration."""
    shutil.rmtree(cache_dir(), ignore_errors=True)


def describe_levels(prepared: Prepared, codecs: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The ladder of every codec, for a run's manifest: name, distortion, bits per element."""
    ladders: dict[str, list[dict[str, Any]]] = {}
    for (_, codec), manifest in prepared.manifests.items():
        if codec in codecs and codec not in ladders:
            ladders[codec] = [
                {"name": x.name, "distortion": x.distortion, "bits_per_element": x.bits_per_element}
                for x in manifest.levels
            ]
    return ladders
