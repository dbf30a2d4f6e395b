"""Contexts in an object store, or anything else that fsspec reaches: `s3://bucket/prefix`, `memory://name`.

    contexts/{id}.json                  a context as it was put: manifest, hashes, and the name of its put
    puts/{id}.{random}/{chunk}.{level}  its encodings; text.bin has the token ids of all chunks, read by ranges
    puts/{id}.{random}/evaluation/...   never served
    used/{id}.{bytes}                   when it was last used: the time of this empty object
    profiles/{sha256}

The first of these is written last, and is the context: what a writer leaves that dies before is not seen, and goes
when it is ABANDONED_S old. What lies under `puts` is never changed, so a reader need not ask whether it was.
What is read is compared with our own SHA-256; an object store's ETags only say that something is new.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Final

from kvstream.codec.profile import MAX_PROFILE_BYTES
from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_json
from kvstream.testbed.store import layout, quota
from kvstream.testbed.store.api import ContextStore, Entry, split_chunk_id
from kvstream.testbed.store.bucket_draft import BucketDraft
from kvstream.testbed.store.layout import checked_id, checked_sha256
from kvstream.testbed.store.manifest import MAX_CHUNK_BYTES, Manifest
from kvstream.testbed.store.remote import Info, Remote

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_CONTEXT_BYTES: Final = 64 << 20
"""Of `contexts/{id}.json`: a manifest has 4 MB, the hashes of as many encodings as it may have take 25 MB."""
ABANDONED_S: Final = 3600.0
"""A put that has written nothing for this long is a dead writer's."""
KNOWN: Final = 64
"""Contexts whose entries are kept for `get_kv`."""


class Bucket(ContextStore):
    """Contexts under one prefix. `create=False` refuses one where nothing is stored; `create` clears up."""

    is_remote: ClassVar[bool] = True
    path: str

    def __init__(
        self, url: str, fs: AbstractFileSystem, root: str, *, create: bool = True, quota_bytes: int | None = None
    ) -> None:
        self.path = re.sub(r"//[^/@]*@", "//", url)  # no password in messages
        self.quota_bytes = quota_bytes
        self._remote = Remote(fs, self.path, root)
        self._known: OrderedDict[str, Entry] = OrderedDict()
        stored = self.stamps()
        if not stored:
            self._remote.check_bucket()
        if create:
            self._sweep(stored)
        elif not stored and not self._remote.files("profiles"):
            raise SpecError(f"{self.path} is not a store: nothing is there yet; fill it with kvstream store --to")

    # --- read

    def stamps(self) -> dict[str, str]:
        stamps = {}
        for name, info in self._remote.files("contexts").items():
            context, dot, kind = name.rpartition(".")
            if dot and kind == "json" and layout.ID.fullmatch(context):
                stamps[context] = info.stamp
        return stamps

    def stamp(self, context: str) -> str:
        try:
            return self._remote.info(_name(context)).stamp
        except FileNotFoundError:
            raise SpecError(f"no context {context!r} in this store") from None

    def entry(self, context: str) -> Entry:
        try:
            data = self._remote.get(_name(context), MAX_CONTEXT_BYTES)
        except FileNotFoundError:
            raise SpecError(f"no context {context!r} in this store") from None
        manifest, hashes, put = _parse(data, context)
        entry = Entry(manifest, hashes, f"puts/{put}")
        self._known[context] = entry
        self._known.move_to_end(context)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return entry

    def read(self, entry: Entry, chunk: int, level: LevelOrText) -> bytes:
        layout.check_chunk(chunk, level)
        chunks, context = entry.manifest.chunks, entry.manifest.context
        try:
            if level == TEXT:
                ends = list(accumulate(one.text_bytes for one in chunks))
                return self._remote.range(
                    f"{entry.place}/text.bin", ends[chunk] - chunks[chunk].text_bytes, ends[chunk]
                )
            assert isinstance(level, int)
            return self._remote.range(f"{entry.place}/{chunk}.{level}", 0, chunks[chunk].sizes_bytes[level])
        except (FileNotFoundError, IndexError):
            raise SpecError(f"no chunk {f'{context}/{chunk}'!r} at level {level!r} in this store") from None

    def texts(self, entry: Entry) -> list[bytes]:
        sizes = [chunk.text_bytes for chunk in entry.manifest.chunks]
        try:
            data = self._remote.range(f"{entry.place}/text.bin", 0, sum(sizes))
        except FileNotFoundError:
            raise SpecError(f"context {entry.manifest.context}: its texts are not in this store") from None
        return [data[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def get_kv(self, identifier: str, level: LevelOrText) -> bytes:
        context, chunk = split_chunk_id(identifier)
        entry = self._known.get(context) or self.entry(context)
        try:
            return self.read(entry, chunk, level)
        except SpecError:  # stored again since, or not there at all
            return self.read(self.entry(context), chunk, level)

    def read_evaluation(self, context: str, name: str) -> bytes:
        try:
            return self._remote.get(f"{self.entry(context).place}/{layout.EVALUATION}/{name}", MAX_CHUNK_BYTES)
        except FileNotFoundError:
            raise SpecError(f"the evaluation of {context} is damaged: {name} is not in this store") from None

    def profile(self, digest: str) -> bytes:
        try:
            data = self._remote.get(f"profiles/{checked_sha256(digest)}", MAX_PROFILE_BYTES)
        except FileNotFoundError:
            raise SpecError(f"no profile {digest} in this store") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise SpecError(f"profile {digest} is damaged in {self.path} (hash); put it again")
        return data

    def check(self, entry: Entry) -> None:
        _check(self._remote, entry.place, entry.manifest)

    # --- write

    def put_profile(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self._remote.put(f"profiles/{digest}", data)
        return digest

    def draft(self, context: str) -> BucketDraft:
        return BucketDraft(self, self._remote, context, self._see)

    def remove(self, context: str) -> None:
        old = self._found(context)
        self._remote.remove(_name(context))
        self._known.pop(context, None)
        if old is not None:
            self._remote.remove(_use(old.manifest))
            self._remote.remove(old.place)

    def _see(self, manifest: Manifest, hashes: Mapping[str, str], put: str) -> None:
        """Make a put the context; the one that was there goes."""
        _check(self._remote, f"puts/{put}", manifest)
        old = self._found(manifest.context)
        self._remote.put(_use(manifest), b"")
        self._remote.put(_name(manifest.context), _pack(manifest, hashes, put))
        self._known.pop(manifest.context, None)
        if old is not None:
            if _use(old.manifest) != _use(manifest):
                self._remote.remove(_use(old.manifest))
            self._remote.remove(old.place)

    def _found(self, context: str) -> Entry | None:
        """None for a context that is not there, or cannot be read."""
        try:
            return self.entry(context)
        except SpecError:
            return None

    def _sweep(self, stored: Collection[str]) -> None:
        """Remove what dead writers have left."""
        puts: dict[str, list[str]] = {}
        for put in self._remote.folders("puts"):
            puts.setdefault(put.rpartition(".")[0], []).append(put)
        for context, names in puts.items():
            if context in stored and len(names) == 1:
                continue
            kept = self._found(context)
            if kept is None and context in stored:  # damaged, or of a later version: not ours to judge
                continue
            for put in names:
                place = f"puts/{put}"
                if (kept is None or kept.place != place) and _is_abandoned(self._remote.files(place)):
                    self._remote.remove(place)
        for name, info in self._remote.files("used").items():
            if name.rpartition(".")[0] not in stored and _is_abandoned({name: info}):
                self._remote.remove(f"used/{name}")

    def touch(self, context: str) -> None:
        entry = self._known.get(context) or self.entry(context)
        self._remote.put(_use(entry.manifest), b"")

    def uses(self) -> dict[str, quota.Use]:
        uses: dict[str, quota.Use] = {}
        for name, info in self._remote.files("used").items():
            context, _, size = name.rpartition(".")
            if size.isdecimal() and (context not in uses or info.modified_s >= uses[context].last_s):
                uses[context] = quota.Use(int(size), info.modified_s)
        stored = self.stamps()
        for context in stored.keys() - uses.keys():
            uses[context] = quota.Use(quota.size_bytes(self.manifest(context)), 0.0)
        return {context: use for context, use in uses.items() if context in stored}

    def free_bytes(self) -> None:
        return None


def _name(context: str) -> str:
    return f"contexts/{checked_id(context)}.json"


def _use(manifest: Manifest) -> str:
    return f"used/{manifest.context}.{quota.size_bytes(manifest)}"


def _is_abandoned(files: Mapping[str, Info]) -> bool:
    """Whether nothing has come for so long that the writer must be dead."""
    return time.time() - max((info.modified_s for info in files.values()), default=0.0) > ABANDONED_S


def _pack(manifest: Manifest, hashes: Mapping[str, str], put: str) -> bytes:
    body = {"manifest": manifest.to_json(), "hashes": dict(hashes), "put": put}
    return json.dumps({"sha256": _digest(body), "context": body}, allow_nan=False, separators=(",", ":")).encode()


def _parse(data: bytes, context: str) -> tuple[Manifest, dict[str, str], str]:
    """Manifest, hashes and name of the put. Raises SpecError."""
    outer = parse_json(data, f"context {context}: {context}.json is damaged; store it again")
    body = outer.get("context") if isinstance(outer, dict) else None
    if not isinstance(body, dict) or outer.get("sha256") != _digest(body):
        raise SpecError(f"context {context}: {context}.json is damaged (hash); store it again")
    try:
        manifest = Manifest.from_json(body.get("manifest"))
    except SpecError as error:
        raise SpecError(f"context {context}: {error}") from error
    hashes, put = body.get("hashes"), body.get("put")
    if manifest.context != context:
        raise SpecError(f"context {context}: its manifest is for {manifest.context!r}; store the context again")
    if (
        not isinstance(put, str)
        or not re.fullmatch(rf"{re.escape(context)}\.[0-9a-f]{{16}}", put)
        or not isinstance(hashes, dict)
    ):
        raise SpecError(f"context {context}: {context}.json is damaged; store it again")
    return manifest, hashes, put


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check(remote: Remote, place: str, manifest: Manifest) -> None:
    """Raises SpecError for a chunk that is missing or of another size, by one listing."""
    sizes = {name: info.size for name, info in remote.files(place).items()}
    wanted = {
        f"{index}.{level}": size
        for index, chunk in enumerate(manifest.chunks)
        for level, size in enumerate(chunk.sizes_bytes)
    }
    wanted["text.bin"] = sum(chunk.text_bytes for chunk in manifest.chunks)
    if wrong := next((name for name, size in wanted.items() if sizes.get(name) != size), None):
        where = wrong.replace(".", "/")
        raise SpecError(f"context {manifest.context}: chunk {where} is missing or not of {wanted[wrong]} bytes")
