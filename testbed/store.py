"""Contexts on disk: what a sender serves, and beside it what only the evaluation reads.

    contexts/{id}/manifest.json             served; there once the context is complete
    contexts/{id}/hashes.json               SHA-256 of every encoded chunk: the ETags
    contexts/{id}/chunks/{chunk}/{level}.bin, text.bin
    contexts/{id}/evaluation/questions.json, reference.safetensors      never served
    profiles/{sha256}

Every file is written whole or not at all. Names that come from outside are checked before they meet a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.api import TEXT, LevelOrText
from testbed.errors import SpecError
from testbed.manifest import ChunkInfo, LevelInfo, Manifest

if TYPE_CHECKING:
    from torch import Tensor

    from codec.api import Codec
    from testbed.llm import Model, Question

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKEN_TYPES = {1: "B", 2: "H", 4: "I"}


def checked_id(context: str) -> str:
    """A context's id, or SpecError: letters, digits, dot, dash and underscore, at most 128, no leading dot."""
    if not _ID.fullmatch(context):
        raise SpecError(f"{context[:140]!r} is not a context id: 1 to 128 letters, digits and ._- not led by ._-")
    return context


def checked_sha256(digest: str) -> str:
    if not _SHA256.fullmatch(digest):
        raise SpecError(f"{digest[:80]!r} is not a SHA-256 in lower-case hexadecimal")
    return digest


def chunk_id(context: str, chunk: int) -> str:
    """The id that `store_kv` gives a chunk and `get_kv` takes."""
    return f"{context}/{chunk}"


def split_chunk_id(identifier: str) -> tuple[str, int]:
    """Context and chunk of a chunk's id. Raises SpecError."""
    context, slash, chunk = identifier.rpartition("/")
    if not slash or not re.fullmatch(r"[0-9]{1,6}", chunk):
        raise SpecError(f"{identifier[:150]!r} is not a chunk id: give context/chunk")
    return checked_id(context), int(chunk)


def text_bytes(token_ids: Sequence[int], vocabulary: int) -> bytes:
    """Token ids little-endian, 1, 2 or 4 bytes each: the fewest that hold the vocabulary."""
    width = 1 if vocabulary <= 1 << 8 else 2 if vocabulary <= 1 << 16 else 4
    ids = array(_TOKEN_TYPES[width], token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def token_ids(data: bytes | memoryview, tokens: int) -> list[int]:
    """Inverse of `text_bytes` for a chunk of `tokens` tokens. Raises SpecError."""
    width, rest = divmod(len(data), tokens)
    if rest or width not in _TOKEN_TYPES:
        raise SpecError(f"{len(data)} bytes are not the ids of {tokens} tokens; fetch the chunk again")
    ids = array(_TOKEN_TYPES[width], bytes(data))
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


class Store:
    """A folder of contexts and profiles. `create=False` refuses a folder that is not there."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if create:
            (self.path / "contexts").mkdir(parents=True, exist_ok=True)
            (self.path / "profiles").mkdir(exist_ok=True)
        elif not (self.path / "contexts").is_dir():
            raise SpecError(f"{self.path} is not a store: it has no folder 'contexts'")

    # --- read

    def contexts(self) -> list[str]:
        """Ids of the complete contexts, sorted."""
        return sorted(path.parent.name for path in (self.path / "contexts").glob("*/manifest.json"))

    def manifest(self, context: str) -> Manifest:
        """Raises SpecError for an unknown context or a damaged manifest."""
        return Manifest.from_json(_read_json(self.manifest_path(context), f"context {context}"))

    def manifest_path(self, context: str) -> Path:
        path = self._folder(context) / "manifest.json"
        if not path.is_file():
            raise SpecError(f"there is no context {context!r} in this store")
        return path

    def chunk_path(self, context: str, chunk: int, level: LevelOrText) -> Path:
        """File of one encoding; it need not exist."""
        if not (level == TEXT or (isinstance(level, int) and level >= 0)) or chunk < 0:
            raise SpecError(f"chunk {chunk!r} at level {level!r} cannot be: both count from 0, or the level is 'text'")
        return self._folder(context) / "chunks" / str(chunk) / f"{level}.bin"

    def get_kv(self, identifier: str, level: LevelOrText) -> bytes:
        """One chunk's bytes at a level, or its token ids for 'text' (the paper's API)."""
        context, chunk = split_chunk_id(identifier)
        try:
            return self.chunk_path(context, chunk, level).read_bytes()
        except FileNotFoundError:
            raise SpecError(f"there is no chunk {identifier!r} at level {level!r} in this store") from None

    def hashes(self, context: str) -> dict[str, str]:
        """SHA-256 of every encoding, by `{chunk}/{level}`."""
        data = _read_json(self._folder(context) / "hashes.json", f"hashes of context {context}")
        return {str(key): str(value) for key, value in data.items()}

    def profile(self, digest: str) -> bytes:
        """Bytes of a profile. Raises SpecError if it is not here."""
        try:
            return (self.path / "profiles" / checked_sha256(digest)).read_bytes()
        except FileNotFoundError:
            raise SpecError(f"there is no profile {digest} in this store") from None

    def questions(self, context: str) -> list[Question]:
        """The questions about a context; evaluation only."""
        from testbed.llm import Question

        rows = _read_json(self._folder(context) / "evaluation" / "questions.json", f"questions of {context}")
        return [Question(tuple(row["prompt_ids"]), tuple(row["answer_ids"])) for row in rows["questions"]]

    def passage(self, context: str) -> list[int]:
        """Token ids of the text that is read after a session; evaluation only."""
        rows = _read_json(self._folder(context) / "evaluation" / "questions.json", f"questions of {context}")
        return list(rows["passage_ids"])

    def reference(self, context: str) -> Tensor:
        """Log-probabilities of passage and answers under the exact cache (see `llm.score`); evaluation only."""
        from safetensors.torch import load_file

        return load_file(self._folder(context) / "evaluation" / "reference.safetensors")["log_probs"]

    # --- write

    def put_profile(self, data: bytes) -> str:
        """Store a profile under its own hash, which is returned."""
        digest = hashlib.sha256(data).hexdigest()
        write_whole(self.path / "profiles" / digest, data)
        return digest

    def put_chunk(self, context: str, chunk: int, level: LevelOrText, data: bytes) -> str:
        """Store one encoding of a context that is being written; its SHA-256 is returned."""
        write_whole(self.chunk_path(context, chunk, level), data)
        return hashlib.sha256(data).hexdigest()

    def withdraw(self, context: str) -> None:
        """Hide a context while its chunks change."""
        (self._folder(context) / "manifest.json").unlink(missing_ok=True)

    def announce(self, manifest: Manifest, hashes: Mapping[str, str]) -> None:
        """Make a context visible. Raises SpecError if a chunk is missing or of another size."""
        for key, size in encodings(manifest):
            chunk, _, level = key.partition("/")
            path = self.chunk_path(manifest.context, int(chunk), level_of(level))
            if not path.is_file() or path.stat().st_size != size or key not in hashes:
                raise SpecError(f"context {manifest.context}: chunk {key} is missing or not of {size} bytes")
        folder = self._folder(manifest.context)
        write_whole(folder / "hashes.json", json.dumps(dict(hashes)).encode())
        write_whole(folder / "manifest.json", json.dumps(manifest.to_json(), allow_nan=False).encode())

    def put_evaluation(
        self, context: str, questions: Sequence[Question], passage: Sequence[int], log_probs: Tensor
    ) -> None:
        from safetensors.torch import save

        rows = [{"prompt_ids": q.prompt_ids, "answer_ids": q.answer_ids} for q in questions]
        folder = self._folder(context) / "evaluation"
        write_whole(folder / "questions.json", json.dumps({"questions": rows, "passage_ids": list(passage)}).encode())
        write_whole(folder / "reference.safetensors", save({"log_probs": log_probs.float().cpu().contiguous()}))

    def _folder(self, context: str) -> Path:
        return self.path / "contexts" / checked_id(context)


def store_kv(
    store: Store,
    context: str,
    token_ids: Sequence[int],
    model: Model,
    codec: Codec,
    *,
    chunk_tokens: int,
    distortions: Sequence[float],
    kv: Tensor | None = None,
) -> dict[int, str]:
    """Encode a context at every level and store it: `{chunk: id}` (the paper's API).

    `distortions[level]` (nats) goes into the manifest; `testbed.calibrate` measures it. `kv` `[L, 2, T, H, D]` is the
    exact cache if the caller has it already.
    """
    from testbed.llm import calculate_kv

    if len(distortions) != len(codec.levels):
        raise SpecError(f"{len(distortions)} distortions were given for {len(codec.levels)} levels")
    if chunk_tokens < 1 or not token_ids:
        raise SpecError("a context needs at least one token and chunks of at least one token")
    exact = calculate_kv(model, token_ids) if kv is None else kv
    if exact.shape[2] != len(token_ids):
        raise SpecError(f"the cache has {exact.shape[2]} tokens, the context {len(token_ids)}")
    store.withdraw(context)
    hashes: dict[str, str] = {}
    chunks: list[ChunkInfo] = []
    for index, start in enumerate(range(0, len(token_ids), chunk_tokens)):
        span = range(start, min(start + chunk_tokens, len(token_ids)))
        text = text_bytes(token_ids[span.start : span.stop], model.vocabulary)
        hashes[f"{index}/{TEXT}"] = store.put_chunk(context, index, TEXT, text)
        sizes: list[int] = []
        for level in range(len(codec.levels)):
            data = codec.encode(exact[:, :, span.start : span.stop], level, positions=span)
            hashes[f"{index}/{level}"] = store.put_chunk(context, index, level, data)
            sizes.append(len(data))
        chunks.append(ChunkInfo(span.start, span.stop, tuple(sizes), len(text)))
    profile = getattr(codec, "profile", None)
    manifest = Manifest(
        context=context,
        model=model.fingerprint,
        codec=codec.get_config(),
        profile=None if profile is None else store.put_profile(profile.to_bytes()),
        kv=model.kv,
        levels=tuple(
            LevelInfo(
                name=level.name,
                distortion=float(distortion),
                bits_per_element=sum(c.sizes_bytes[i] for c in chunks)
                * 8
                / (len(token_ids) * model.kv.elements_per_token),
            )
            for i, (level, distortion) in enumerate(zip(codec.levels, distortions, strict=True))
        ),
        chunks=tuple(chunks),
    )
    store.announce(manifest, hashes)
    return {index: chunk_id(context, index) for index in range(len(chunks))}


def get_kv(store: Store, identifier: str, level: LevelOrText) -> bytes:
    """One chunk's bytes at a level, or its token ids for 'text' (the paper's API). Over HTTP: `Client.get_kv`."""
    return store.get_kv(identifier, level)


def store_evaluation(
    store: Store,
    context: str,
    model: Model,
    kv: Tensor,
    questions: Sequence[Question],
    passage: Sequence[int] = (),
) -> tuple[bool, ...]:
    """Read the passage and answer the questions over the exact cache; keep the log-probabilities beside the context.

    Returns which answers were right: what no level can be expected to beat.
    """
    from testbed.llm import SIDE_BY_SIDE_TOKENS, score

    longest = max((len(q.prompt_ids) + len(q.answer_ids) for q in questions), default=0)
    longest = max(longest, len(passage))
    cache = model.new_cache(kv.shape[2] + max(longest, SIDE_BY_SIDE_TOKENS))
    cache.length = kv.shape[2]
    cache.view().copy_(kv)
    result = score(model, cache, questions, passage)
    store.put_evaluation(context, questions, passage, result.log_probs)
    return result.right


def encodings(manifest: Manifest) -> Iterator[tuple[str, int]]:
    """Every encoding of a context as (`{chunk}/{level}`, bytes)."""
    for index, chunk in enumerate(manifest.chunks):
        yield f"{index}/{TEXT}", chunk.text_bytes
        for level, size in enumerate(chunk.sizes_bytes):
            yield f"{index}/{level}", size


def level_of(text: str) -> LevelOrText:
    """A level as written in a URL or file name. Raises SpecError."""
    if text == TEXT:
        return TEXT
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise SpecError(f"{text[:40]!r} is not a level: give a number from 0, or 'text'")
    return int(text)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees it completely or not at all.

    There is no fsync: a power failure may leave a short file, which readers notice by the manifest's sizes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SpecError(f"{what}: {path.name} is not in this store") from None
    except ValueError as error:
        raise SpecError(f"{what}: {path.name} is damaged ({error}); store the context again") from error
