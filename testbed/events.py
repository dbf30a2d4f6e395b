"""The events of a run in progress: one JSON object per line, appended to `runs/<name>/events.jsonl`.

Any process of a run may append: a line is one write to a file opened for appending, so lines never mix. Losing the
file loses nothing, since `cells/` holds the results. Times are seconds since the session's request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

FILE_NAME = "events.jsonl"


@dataclass(frozen=True)
class RunStart:
    """A run starts or resumes."""

    kind: ClassVar[str] = "run_start"
    name: str
    backend: str
    schemes: Sequence[str]
    sessions: int
    """Sessions of this run in total; those that have a cell already are not announced again."""


@dataclass(frozen=True)
class SessionStart:
    """A session's request is sent."""

    kind: ClassVar[str] = "session_start"
    unit_id: str
    scheme: str
    policy: str
    codec: str
    context: str
    trace: str
    deadline_s: float
    n_chunks: int
    n_levels: int
    capacity: Sequence[tuple[float, float]] = ()
    """(from t_s, bit/s at layer 2): the trace's steps from 0 on."""
    capacity_until_s: float = 0.0
    """The capacity after this time is not given."""
    clairvoyant: bool = False
    depth: int = 2
    overlap: bool = True


@dataclass(frozen=True)
class ChunkNews:
    """The state of one chunk: sent when it is requested, arrives, and is decoded, and up to 20 times per second in
    between.

    `record` holds the fields of `kvstream.testbed.session.record.ChunkRecord` that are known; a later event
    of a chunk replaces earlier ones.
    """

    kind: ClassVar[str] = "chunk"
    unit_id: str
    scheme: str
    t_s: float
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SessionEnd:
    """A session is over; `row` is its row of `sessions.jsonl`."""

    kind: ClassVar[str] = "session_end"
    row: Mapping[str, Any]


@dataclass(frozen=True)
class RunEnd:
    """The run has ended; `verdict` is the summary's."""

    kind: ClassVar[str] = "run_end"
    verdict: str


Event: TypeAlias = RunStart | SessionStart | ChunkNews | SessionEnd | RunEnd


def line(event: Event) -> str:
    """The JSON of an event, without a newline."""
    return json.dumps({"event": event.kind, **asdict(event)}, separators=(",", ":"))


def append(file: Path, event: Event) -> None:
    """Add one event to a run's `events.jsonl`."""
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, line(event).encode() + b"\n")
    finally:
        os.close(fd)


def read(file: Path, offset: int = 0) -> Iterator[tuple[str, int]]:
    """(line, offset after it) of every complete line from `offset` on; nothing if the file does not exist yet."""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            for raw in stream:
                if not raw.endswith(b"\n"):
                    return
                offset += len(raw)
                yield raw[:-1].decode(), offset
    except FileNotFoundError:
        return
