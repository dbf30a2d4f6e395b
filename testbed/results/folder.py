"""The files of a run, and how to read them back.

`runs/<name>/` holds `manifest.json` (what was run, on what), `cells/<unit>-<scheme>.json` (one session each, written
whole or not at all; the simulator, whose sessions take less time than a file, writes those of a unit into
`cells/<unit>.json`) and, rebuilt from the cells at any time, `sessions.jsonl`, `chunks.jsonl`, `link.jsonl` and
`summary.json` (and `packets.jsonl` of a run with captures). A cell that exists is not run again;
`<unit>-<scheme>.failure.json` marks one that failed and is retried.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_type_hints

from kvstream.testbed import files
from kvstream.testbed.config import type_check
from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.paired import is_counted, units_of

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
"""Keys and types that readers of `manifest.json` rely on."""
_ALWAYS: Final = ("experiment", "backend", "schemes")
_CELL: Final[Json] = {"row": dict, "chunks": list[dict], "link": list}
"""The chunks' contents are not checked: large runs have millions."""
_INPUTS: Final[Mapping[str, str]] = {
    "traces": "a trace",
    "files": "the file of a policy or a context",
    "profiles": "a codec's profile",
    "model": "the model",
}
"""Inputs by their key in the manifest; a run whose inputs have changed is not resumed."""


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
    """`mininet` or `simulator`, never mixed in one run."""
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
    """Sessions discarded before this one because the link deviated from its trace."""
    slowdown: Json | None = None
    """Slowdown of the compute steps under load, relative to running alone (kvstream.testbed.receiver.warmup)."""
    prior_bps: float | None = None
    """Goodput that a probe measured before the session; None without a probe, or if nothing arrived."""
    prior_rtt_s: float | None = None
    """Round-trip time that the same probe measured, on emulated links."""
    reference: bool = False
    """A reference line, on a few units and compared with nothing."""
    capture: Json | None = None
    """Packet analysis, where packets were captured (kvstream.testbed.emulator.analysis)."""


_DEFAULTS: Final = {f.name: json.loads(json.dumps(f.default)) for f in fields(Experiment) if f.default is not MISSING}
"""What an experiment is in settings that a run of an earlier version does not know."""
_ROW: Final[Json] = get_type_hints(Row)
_SHOWN: Final = 100
"""Characters of a setting's value in a message."""
_RENAMED: Final = {"strain": "slowdown"}
"""Fields of rows by their names in runs of earlier versions."""
_IN_EVERY_ROW: Final = [f.name for f in fields(Row) if f.default is MISSING]


SIMULATED: Final = "simulated"
"""The folder, within an emulated run's, of the same experiment in the simulator."""


class Run:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = path / "cells"
        self._cached_schemes: tuple[str, set[str]] = ("", set())

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run that exists. Raises SpecError otherwise."""
        run = cls(Path(path))
        if not run.exists():
            raise SpecError(f"{path}: not a run (manifest.json is missing); give a folder under runs/")
        return run

    def exists(self) -> bool:
        """Whether a run has begun in this folder."""
        return (self.path / "manifest.json").is_file()

    def create(self, manifest: Json) -> None:
        """Start or resume a run, or a shard of it beside others; networks that others have noted are kept.

        Raises SpecError if the folder holds a different experiment.
        """
        self.cells.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if self.exists():
                before = self.manifest
                other = difference(before, manifest)
                if other == "experiment":
                    raise SpecError(f"{self.path} holds another experiment: {_other(before, manifest)}; "
                                    "choose another --name or start over with --fresh")  # fmt: skip
                if other:
                    raise SpecError(f"{self.path}: {other} has changed since; start over with --fresh")
                if "networks" in manifest:
                    manifest = manifest | {"networks": before.get("networks", {}) | manifest["networks"]}
            write_whole(self.path / "manifest.json", manifest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing what all of them write: the manifest, and what is made from the cells."""
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a file system without such locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    @property
    def manifest(self) -> Json:
        """The content of `manifest.json`. Raises SpecError if it is damaged."""
        file = self.path / "manifest.json"
        with _damage(file, "run it again with --fresh"):
            manifest = _checked(json.loads(file.read_bytes()), _MANIFEST, _ALWAYS)
            _checked(manifest["experiment"], get_type_hints(Experiment) | {"schemes": list[dict]}, ["name"])
            for scheme in manifest["schemes"]:
                _checked(scheme, {"name": str}, ["name"])
            return manifest

    @property
    def compared(self) -> list[str]:
        """Names of the schemes that are compared, without reference lines, in the experiment's order."""
        return [scheme["name"] for scheme in self.manifest["schemes"] if not scheme.get("reference")]

    @property
    def traces(self) -> list[str]:
        """The trace of each unit of the experiment, whether it has run or not."""
        return [unit["trace"] for unit in self.manifest.get("units", ())]

    def has(self, unit_id: str, scheme: str) -> bool:
        return self._cell(unit_id, scheme).is_file() or scheme in self._schemes_of(unit_id)

    def tried(self, unit_id: str, scheme: str) -> bool:
        """Whether the session is done, or has failed."""
        return self.has(unit_id, scheme) or self._failure(unit_id, scheme).is_file()

    def save(self, row: Row, chunks: list[Json], link: list[Json], packets: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write one session. A failed one goes to a file of its own, so that the next run retries it."""
        cell = {"row": vars(row), "chunks": chunks, "link": link} | ({"packets": list(packets)} if packets else {})
        if row.status == "failed":
            write_whole(self._failure(row.unit_id, row.scheme), cell)
        else:
            write_whole(self._cell(row.unit_id, row.scheme), cell)
            self.forget_failure(row.unit_id, row.scheme)

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
        before = read_cells(file) if file.is_file() else []
        # quickly simulated again, so no fsync
        write_whole(file, {"cells": [*before, *done]}, durable=False)
        self._cached_schemes = ("", set())
        for cell in done:
            self.forget_failure(cell["row"]["unit_id"], cell["row"]["scheme"])

    def forget_failure(self, unit_id: str, scheme: str) -> None:
        """The session is done after all."""
        self._failure(unit_id, scheme).unlink(missing_ok=True)

    def load_cells(self) -> Iterator[Json]:
        """Every session so far, failed ones included, in a fixed order."""
        for file in sorted(self.cells.glob("*.json")):
            yield from read_cells(file)

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
        """Schemes whose sessions are in the unit's file; callers ask scheme by scheme, so the last answer is cached."""
        if self._cached_schemes[0] != unit_id:
            file = self.cells / f"{unit_id}.json"
            cells = read_cells(file) if file.is_file() else []
            self._cached_schemes = (unit_id, {cell["row"]["scheme"] for cell in cells})
        return self._cached_schemes[1]


def difference(before: Json, now: Json) -> str:
    """What two runs' manifests differ in so that their sessions are not comparable: `experiment`, or an input in words;
    empty if in nothing."""
    now = json.loads(json.dumps(_finite(now)))
    same = _DEFAULTS | before["experiment"] == _DEFAULTS | now["experiment"]
    if not same or before["backend"] != now["backend"]:
        return "experiment"
    return next((what for key, what in _INPUTS.items() if before.get(key, {}) != now.get(key, {})), "")


def _other(before: Json, now: Json) -> str:
    """Which settings of two experiments differ, and how: the first ones in full, then their names."""
    now = json.loads(json.dumps(_finite(now)))
    if before["backend"] != now["backend"]:
        return f"its sessions are of the backend {before['backend']}, not {now['backend']}"
    one, other = _DEFAULTS | before["experiment"], _DEFAULTS | now["experiment"]
    order = {**before["experiment"], **other}  # as the experiment is written
    keys = [key for key in order if one.get(key) != other.get(key)]
    shown = [f"{key} was {_brief(key, one.get(key))}, is {_brief(key, other.get(key))}" for key in keys[:2]]
    return "; ".join(shown) + (f"; also {', '.join(keys[2:])}" if keys[2:] else "")


def _brief(key: str, value: Any) -> str:
    if key == "schemes" and isinstance(value, list):
        value = [" on ".join((entry["policy"], entry["codec"])) for entry in value]
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def load(path: str | Path, *, every: bool = False) -> pandas.DataFrame:
    """The sessions of a run that count in its report, as a DataFrame: one row per session, with the columns of
    `sessions.jsonl`.

    Units with an invalid session, or without a session of every scheme, are left out for all schemes, so that what is
    left is paired; reference lines (`reference`) are on a few units only. Failed sessions count, as missed deadlines
    without a TTFT. `every` gives all sessions.
    """
    import pandas

    run = Run.open(path)
    rows = run.rows()
    if not every:
        schemes = run.compared
        counted = {unit for unit, cells in units_of(rows).items() if is_counted(cells, schemes)}
        rows = [
            row for row in rows if (row["status"] != "invalid" if row.get("reference") else row["unit_id"] in counted)
        ]
    return pandas.DataFrame(rows)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Sessions as CSV: nested values in columns of their own (`fidelity.ok`), lists as JSON, None as an empty field."""
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
    """Turn any defect of a run's file into one line that ends with the fix."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # SpecError, JSON and Unicode errors are ValueErrors
        raise SpecError(f"{file} is damaged ({error}); {fix}") from None


def _checked(value: Any, hints: Json, needed: Iterable[str]) -> Json:
    """The value, if it is an object with the needed keys and the types of `hints`. Raises SpecError."""
    if not isinstance(value, dict):
        raise SpecError("not a JSON object")
    lacking = [key for key in needed if key not in value]
    if lacking:
        raise SpecError(f"{lacking[0]} is missing")
    type_check.check(value, hints)
    return value


def read_cells(file: Path) -> list[Json]:
    """The sessions in a file: one, or those of a unit. Raises SpecError."""
    with _damage(file, "remove it, and the next run repeats the session"):
        body = _checked(json.loads(file.read_bytes()), {"cells": list}, ())
        cells: list[Json] = body.get("cells", [body])
        for cell in cells:
            row = _checked(cell, _CELL, _CELL)["row"]
            for old, new in _RENAMED.items():
                if old in row:
                    row[new] = row.pop(old)
            _checked(row, _ROW, _IN_EVERY_ROW)
        return cells


def write_whole(path: Path, data: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one, never a part.

    Without `durable` it is faster, for many files: a power failure may leave the file empty.
    """
    text = _text(data, indent=1 if durable else None) + "\n"
    files.write_whole(path, text.encode(), durable=durable)


class _replacing:
    """A .jsonl file that takes the old one's place when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")

    def __enter__(self) -> _replacing:
        self._file = self._part.open("w")
        return self

    def line(self, data: Mapping[str, Any]) -> None:
        self._file.write(_text(data) + "\n")

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                self._part.replace(self._path)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(self._path)) from error
        finally:
            self._part.unlink(missing_ok=True)


def _text(data: Mapping[str, Any], indent: int | None = None) -> str:
    """As JSON, which has no infinity: what is not finite becomes null."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except (ValueError, TypeError):  # a number that is not finite, or a mapping that is no dict: seldom
        return json.dumps(_finite(data), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
