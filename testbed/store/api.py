"""What a store of contexts does, whether it is a folder (`store`) or lies in an object store (`bucket`).

A context is put whole or not at all, and what is put is never changed in place: `Entry` is a context as it was found,
and everything that is read through it belongs together, or raises. Every call may block.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_json
from kvstream.testbed.store import quota
from kvstream.testbed.store.layout import checked_id, encodings
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

    from kvstream.testbed.store.questions import Question

QUESTIONS = "questions.json"
REFERENCE = "reference.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored context as it was found."""

    manifest: Manifest
    hashes: Mapping[str, str]
    """SHA-256 of every encoding, by `{chunk}/{level}`."""
    place: str
    """Where its files lie."""


class ContextStore(ABC):
    """Contexts and profiles. `path` is where, as `opening.open_store` takes it."""

    is_remote: ClassVar[bool]
    """Whether a look costs a request: then nothing is read before it is asked for."""
    path: Path | str
    quota_bytes: int | None = None
    """Most that the contexts may take together; those used last stay."""

    # --- read

    @abstractmethod
    def stamps(self) -> dict[str, str]:
        """The complete contexts and their stamps, in one listing."""

    @abstractmethod
    def stamp(self, context: str) -> str:
        """A context's stamp, by one look. Raises SpecError for an unknown one."""

    @abstractmethod
    def entry(self, context: str) -> Entry:
        """Raises SpecError for an unknown or damaged context."""

    @abstractmethod
    def read(self, entry: Entry, chunk: int, level: LevelOrText) -> bytes:
        """One encoding, not checked against its hash. Raises SpecError if it is not there."""

    def texts(self, entry: Entry) -> list[bytes]:
        """The token ids of all chunks, not checked against their hashes. Raises SpecError if one is not there."""
        return [self.read(entry, index, TEXT) for index in range(len(entry.manifest.chunks))]

    @abstractmethod
    def read_evaluation(self, context: str, name: str) -> bytes:
        """A file that only the evaluation reads. Raises SpecError if it is not there."""

    @abstractmethod
    def profile(self, digest: str) -> bytes:
        """Bytes of a profile. Raises SpecError if it is not in the store."""

    @abstractmethod
    def check(self, entry: Entry) -> None:
        """Raises SpecError for a chunk that is missing or of another size; contents are not read."""

    def contexts(self) -> list[str]:
        """Ids of the complete contexts, sorted."""
        return sorted(self.stamps())

    def manifest(self, context: str) -> Manifest:
        """Raises SpecError for an unknown context or a damaged manifest."""
        return self.entry(context).manifest

    def hashes(self, context: str) -> Mapping[str, str]:
        """SHA-256 of every encoding, by `{chunk}/{level}`."""
        return self.entry(context).hashes

    def get_kv(self, identifier: str, level: LevelOrText) -> bytes:
        """One chunk's bytes at a level, or its token ids for 'text' (the paper's API)."""
        context, chunk = split_chunk_id(identifier)
        return self.read(self.entry(context), chunk, level)

    def questions(self, context: str) -> list[Question]:
        """The questions about a context; evaluation only."""
        from kvstream.testbed.store.questions import Question

        rows = self._evaluation(context)["questions"]
        return [Question(tuple(row["prompt_ids"]), tuple(row["answer_ids"])) for row in rows]

    def passage(self, context: str) -> list[int]:
        """Token ids of the text that is scored after a session; evaluation only."""
        return list(self._evaluation(context)["passage_ids"])

    def exact_right(self, context: str) -> int:
        """How many of the questions are answered right over the exact cache; evaluation only."""
        return int(self._evaluation(context)["exact_right"])

    def reference(self, context: str) -> Tensor:
        """Log-probabilities of passage and answers under the exact cache (`engine.model.score`); evaluation only."""
        from safetensors.torch import load

        return load(self.read_evaluation(context, REFERENCE))["log_probs"]

    def fault(self, context: str, *, evaluation: bool = False) -> str | None:
        """Why a context cannot be used, read without its chunks' contents; None for a whole one."""
        try:
            self.check(self.entry(context))
            if evaluation:
                self.questions(context)
                self.exact_right(context)
                self.reference(context)
        except SpecError as error:
            return str(error)
        except Exception as error:  # whatever a damaged file makes of its reader
            return f"context {context}: the evaluation is damaged ({type(error).__name__}); store the context again"
        return None

    # --- write

    @abstractmethod
    def put_profile(self, data: bytes) -> str:
        """Store a profile under its SHA-256, which is returned."""

    @abstractmethod
    def draft(self, context: str) -> Draft:
        """Begin to write a context, which is seen when it is published."""

    @abstractmethod
    def remove(self, context: str) -> None:
        """Remove a context, if it is there: first it is not seen any more, then its files go."""

    @abstractmethod
    def touch(self, context: str) -> None:
        """Note that a context is used now."""

    @abstractmethod
    def uses(self) -> dict[str, quota.Use]:
        """[context]: its bytes, and when it was put or used last."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """What there is still room for; None where nobody says."""

    def _evaluation(self, context: str) -> Any:
        return parse_json(
            self.read_evaluation(context, QUESTIONS), f"questions of {context}: {QUESTIONS} is damaged; store it again"
        )


class Draft(ABC):
    """One context that is being written. Use it as a context manager: what is not published is removed.

    Chunks may come in any order and from several threads.
    """

    def __init__(self, store: ContextStore, context: str) -> None:
        self.store = store
        self.context = checked_id(context)
        self.hashes: dict[str, str] = {}
        """SHA-256 of what has been written, by `{chunk}/{level}`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def put_chunk(self, chunk: int, level: LevelOrText, data: bytes) -> str:
        """Write one encoding; returns its SHA-256. It may be read from `data` until the context is published."""
        self._write(chunk, level, data)
        digest = self.hashes[f"{chunk}/{level}"] = hashlib.sha256(data).hexdigest()
        return digest

    def put_evaluation(
        self, questions: Sequence[Question], passage: Sequence[int], log_probs: Tensor, right: int
    ) -> None:
        """Write what only the evaluation reads; `right` answers are right over the exact cache."""
        from safetensors.torch import save

        rows = [{"prompt_ids": q.prompt_ids, "answer_ids": q.answer_ids} for q in questions]
        facts: dict[str, Any] = {"questions": rows, "passage_ids": list(passage), "exact_right": right}
        self._write_evaluation(QUESTIONS, json.dumps(facts).encode())
        self._write_evaluation(REFERENCE, save({"log_probs": log_probs.float().cpu().contiguous()}))

    def publish(self, manifest: Manifest) -> None:
        """Put the context into its place, instead of one that was there; then others go, if there is a quota.

        Raises SpecError if a chunk is missing or of another size, or the context is larger than the quota.
        """
        if manifest.context != self.context:
            raise SpecError(f"the manifest is for context {manifest.context!r}, not {self.context!r}")
        quota.admit(self.store, manifest)
        if lacking := next((key for key, _ in encodings(manifest) if key not in self.hashes), None):
            raise SpecError(f"context {manifest.context}: chunk {lacking} is missing")
        self._publish(manifest)
        quota.evict(self.store, keep=self.context)

    @abstractmethod
    def new_part(self) -> Path:
        """A file of this machine, not there yet, whose content `take` will take."""

    @abstractmethod
    def take(self, part: Path, chunk: int, level: LevelOrText, digest: str) -> None:
        """Make a part's content one encoding; `digest` is its SHA-256."""

    @abstractmethod
    def discard(self) -> None:
        """Remove the draft, unless it was published. May be called twice."""

    @abstractmethod
    def _write(self, chunk: int, level: LevelOrText, data: bytes) -> None: ...

    @abstractmethod
    def _write_evaluation(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def _publish(self, manifest: Manifest) -> None:
        """Raises SpecError if a chunk is not of the manifest's size."""


def chunk_id(context: str, chunk: int) -> str:
    """The id that `store_kv` gives a chunk and `get_kv` takes."""
    return f"{context}/{chunk}"


def split_chunk_id(identifier: str) -> tuple[str, int]:
    """Context and chunk of a chunk's id. Raises SpecError."""
    context, slash, chunk = identifier.rpartition("/")
    if not slash or not re.fullmatch(r"[0-9]{1,6}", chunk):
        raise SpecError(f"{identifier[:150]!r} is not a chunk id: give context/chunk")
    return checked_id(context), int(chunk)
