"""The files of a run, and how to read them back.

`runs/<name>/` holds `manifest.json` (what was run, on what), `cells/<unit>-<scheme>.json` (one session each, written
whole or not at all; the simulator, whose sessions take less time than a file, writes those of a unit into
`cells/<unit>.json`) and, rebuilt from the cells at any time, `sessions.jsonl`, `chunks.jsonl`, `link.jsonl` and
`summary.json` (and `packets.jsonl` of a run with captures). A cell that exists is not run again;
`<unit>-<scheme>.failure.json` marks one that failed and is retried.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_type_hints

from testbed import typed
from testbed.errors import SpecError
from testbed.experiment import Experiment

if TYPE_CHECKING:
    import pandas

Status: TypeAlias = Literal["ok", "failed", "invalid"]
Json: TypeAlias = dict[str, Any]

_MANIFEST: Final[Json] = {
    "experiment": dict,
    "backend": str,
    "schemes": list,
    "levels": dict[str, list],
    **dict.fromkeys(("traces", "profiles", "files", "model", "versions"), dict),
}
"""What a reader of `manifest.json` relies on."""
_ALWAYS: Final = ("experiment", "backend", "schemes")
_CELL: Final[Json] = {"row": dict, "chunks": list[dict], "link": list}
"""Not what is in the chunks: large runs have millions of them."""
_INPUTS: Final[Mapping[str, str]] = {
    "traces": "a trace",
    "files": "the file of a policy or a context",
    "profiles": "a codec's profile",
    "model": "the model",
}
"""What a run is made from, by its key in the manifest; a run whose cells are from others does not go on."""


@dataclass(frozen=True)
class Row:
    """One session: a row of `sessions.jsonl`. None where a failed session has no value."""

    unit_id: str
    scheme: str
    policy: str
    codec: str
    clairvoyant: bool
    model: str
    backend: str
    """`mininet`, or `simulator`: never mixed in one run."""
    context: str
    trace: str
    offset_s: float
    link: str
    seed: int
    depth: int
    overlap: bool
    status: Status
    why: str
    """Why the session failed or is invalid; empty when it is ok."""
    deadline_s: float
    ttft_s: float | None
    met: bool
    distortion: float | None
    measured_kl: float | None
    """Mean KL (nats) of the next-token distribution against the exact cache, over the first tokens that are read after
    the session: a passage of text, and the answers."""
    answer_ok: bool | None
    """The timed question's answer, from the cache that arrived."""
    answers_right: int | None
    answers: int | None
    levels: list[int | str]
    bytes: int | None
    wasted_bytes: int | None
    policy_faults: int
    oracle_distortion: float | None
    """The least distortion that could meet the deadline on this unit and codec; None if nothing could."""
    oracle_levels: list[int | str]
    regret: float | None
    """distortion - oracle_distortion where this session met the deadline; None otherwise."""
    fidelity: Json
    repeats: int
    """Sessions thrown away before this one because the link was not what the trace says."""
    strain: Json | None = None
    """How many times as long as alone the steps of compute were reckoned to take (testbed.rehearsal)."""
    prior_bps: float | None = None
    """Goodput that the link was probed for before the session; None without a probe, or if nothing came through."""
    prior_rtt_s: float | None = None
    """The round trip that the same probe saw, over emulated links."""
    capture: Json | None = None
    """What the packets say, where they were recorded (testbed.emulator.analysis)."""


_ROW: Final[Json] = get_type_hints(Row)
_IN_EVERY_ROW: Final = [f.name for f in fields(Row) if f.default is MISSING]


class Run:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = path / "cells"
        self._looked_up: tuple[str, set[str]] = ("", set())

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run that exists. Raises SpecError otherwise."""
        run = cls(Path(path))
        if not run.exists():
            raise SpecError(f"{path}: no run is there (manifest.json is missing); give a folder under runs/")
        return run

    def exists(self) -> bool:
        """Whether a run has begun in this folder."""
        return (self.path / "manifest.json").is_file()

    def create(self, manifest: Json) -> None:
        """Begin, or go on with, a run. Raises SpecError if the folder holds a different experiment."""
        old = self.path / "manifest.json"
        if old.is_file():
            before, now = self.manifest, json.loads(json.dumps(_finite(manifest)))
            if any(before[key] != now[key] for key in ("experiment", "backend")):
                raise SpecError(f"{self.path} holds another experiment; choose another --name, or --fresh starts over")
            for key, words in _INPUTS.items():
                if before.get(key, {}) != now.get(key, {}):
                    raise SpecError(f"{self.path}: {words} has changed since; --fresh starts over")
        self.cells.mkdir(parents=True, exist_ok=True)
        write_whole(old, manifest)

    @property
    def manifest(self) -> Json:
        """Raises SpecError for a file that is none."""
        file = self.path / "manifest.json"
        with _damage(file, "run it again with --fresh"):
            manifest = _checked(json.loads(file.read_text(encoding="utf-8")), _MANIFEST, _ALWAYS)
            _checked(manifest["experiment"], get_type_hints(Experiment) | {"schemes": list[dict]}, ["name"])
            for scheme in manifest["schemes"]:
                _checked(scheme, {"name": str}, ["name"])
            return manifest

    def has(self, unit_id: str, scheme: str) -> bool:
        return self._cell(unit_id, scheme).is_file() or scheme in self._schemes_of(unit_id)

    def save(self, row: Row, chunks: list[Json], link: list[Json], packets: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write one session. A failed one is kept apart, so that the next run tries it again."""
        cell = {"row": vars(row), "chunks": chunks, "link": link} | ({"packets": list(packets)} if packets else {})
        done, failure = self._cell(row.unit_id, row.scheme), self._failure(row.unit_id, row.scheme)
        if row.status == "failed":
            write_whole(failure, cell)
        else:
            write_whole(done, cell)
            failure.unlink(missing_ok=True)

    def save_unit(self, sessions: Sequence[tuple[Row, list[Json]]]) -> None:
        """Write several sessions of one unit, (row, chunks) each, into one file."""
        done: list[Json] = []
        for row, chunks in sessions:
            if row.status == "failed":
                self.save(row, chunks, [])
            else:
                done.append({"row": vars(row), "chunks": chunks, "link": []})
        if not done:
            return
        file = self.cells / f"{sessions[0][0].unit_id}.json"
        before = _cells(file) if file.is_file() else []
        # what is computed again in no time needs no fsync
        write_whole(file, {"cells": [*before, *done]}, durable=False)
        self._looked_up = ("", set())
        for cell in done:
            self._failure(cell["row"]["unit_id"], cell["row"]["scheme"]).unlink(missing_ok=True)

    def load_cells(self) -> Iterator[Json]:
        """Every session so far, failed ones included, in a fixed order."""
        for file in sorted(self.cells.glob("*.json")):
            yield from _cells(file)

    def rows(self) -> list[Json]:
        return [cell["row"] for cell in self.load_cells()]

    def rebuild(self) -> list[Json]:
        """Write the .jsonl files from the cells; returns the rows."""
        rows: list[Json] = []
        packets: list[Json] = []
        with (
            _replacing(self.path / "sessions.jsonl") as sessions,
            _replacing(self.path / "chunks.jsonl") as chunks,
            _replacing(self.path / "link.jsonl") as link,
        ):
            for cell in self.load_cells():
                key = {"unit_id": cell["row"]["unit_id"], "scheme": cell["row"]["scheme"]}
                rows.append(cell["row"])
                sessions.line(cell["row"])
                for chunk in cell["chunks"]:
                    chunks.line(key | chunk)
                for sample in cell["link"]:
                    link.line(key | sample)
                packets += [key | window for window in cell.get("packets", ())]
        if packets:
            with _replacing(self.path / "packets.jsonl") as windows:
                for window in packets:
                    windows.line(window)
        return rows

    def _cell(self, unit_id: str, scheme: str) -> Path:
        return self.cells / f"{unit_id}-{scheme}.json"

    def _failure(self, unit_id: str, scheme: str) -> Path:
        return self.cells / f"{unit_id}-{scheme}.failure.json"

    def _schemes_of(self, unit_id: str) -> set[str]:
        """Schemes whose sessions are in the unit's one file; asked scheme by scheme, so the last unit is kept."""
        if self._looked_up[0] != unit_id:
            file = self.cells / f"{unit_id}.json"
            cells = _cells(file) if file.is_file() else []
            self._looked_up = (unit_id, {cell["row"]["scheme"] for cell in cells})
        return self._looked_up[1]


def load(path: str | Path) -> pandas.DataFrame:
    """The sessions of a run as a DataFrame, one row a session with the columns of `sessions.jsonl`."""
    import pandas

    return pandas.DataFrame(Run.open(path).rows())


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Sessions as CSV: facts of a table in columns of their own (`fidelity.ok`), lists as JSON, nothing as nothing."""
    flat = [_flat(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Mapping[str, Any], head: str = "") -> Json:
    found: Json = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{head}{key}.")
        else:
            found[head + key] = json.dumps(value) if isinstance(value, list | tuple) else value
    return found


@contextmanager
def _damage(file: Path, fix: str) -> Iterator[None]:
    """Whatever is wrong with a file of a run, as one line that ends with what to do about it."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # SpecError is a ValueError, as is what is no JSON or no text
        raise SpecError(f"{file} is damaged ({error}); {fix}") from None


def _checked(value: Any, hints: Json, needed: Iterable[str]) -> Json:
    """A table that has what is needed, in the types of `hints`. Raises SpecError."""
    if not isinstance(value, dict):
        raise SpecError("it holds no table")
    lacking = [key for key in needed if key not in value]
    if lacking:
        raise SpecError(f"{lacking[0]} is missing")
    typed.check(value, hints)
    return value


def _cells(file: Path) -> list[Json]:
    """The sessions in a file: one, or those of a unit. Raises SpecError."""
    with _damage(file, "remove it, and the next run measures it again"):
        body = _checked(json.loads(file.read_text(encoding="utf-8")), {"cells": list}, ())
        cells: list[Json] = body.get("cells", [body])
        for cell in cells:
            _checked(_checked(cell, _CELL, _CELL)["row"], _ROW, _IN_EVERY_ROW)
        return cells


def write_whole(path: Path, data: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one and nothing between.

    Not durable is fast and for many: a reader sees the same, but after a loss of power the file may be empty.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w") as file:
        file.write(json.dumps(_finite(data), indent=1 if durable else None) + "\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())
    part.replace(path)


class _replacing:
    """A .jsonl file that takes the old one's place when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> _replacing:
        self._file = self._part.open("w")
        return self

    def line(self, data: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite(data)) + "\n")

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()


def _finite(value: Any) -> Any:
    """JSON knows no infinity: what is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
