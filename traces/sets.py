"""Sets of traces: a folder, a pattern (`logs/*.csv`, `logs/**/*.log`), or every part of a file (`part=all`).

    norway/,format=pensieve,sample=20,seed=1,min_length=60s,skip=on

What a single file takes as settings (format, how to read, transforms) applies to every member. A set takes, besides:

    sample=20,seed=1                 so many of its members, drawn by the seed
    min_length=60s, max_length=10min, min_mean=1Mbps, max_mean=6Mbps      only members like that
    skip=on                          go on without files that cannot be read; they are counted

Members come in the order of their names. Files whose names begin with a dot are no members.
"""

from __future__ import annotations

import glob
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstream.traces import formats, grammar
from kvstream.traces.errors import TraceError
from kvstream.traces.resolve import SET_SETTINGS, is_file_like, label, open_trace, parsed
from kvstream.traces.trace import Trace
from kvstream.traces.units import parse_rate, parse_time

MAX_FILES: Final = 100_000
MAX_NAMED: Final = 50
"""So many files with one reason are named in an error; all of them are in `trace show`."""


@dataclass(frozen=True)
class Member:
    """A trace and the spec that opens it again."""

    spec: str
    trace: Trace


@dataclass(frozen=True)
class Opened:
    """What a spec denotes: one trace, or several."""

    members: tuple[Member, ...]
    skipped: Mapping[str, str]
    """[file]: why it could not be read, of those that were skipped."""


def open_all(spec: str) -> Opened:
    """The traces that a spec denotes. Raises TraceError, which names every file of a set that cannot be read."""
    found = survey(spec)
    if found.skipped and not (found.members and _skips(spec)):
        raise TraceError(_complaint(spec, found))
    return found


def survey(spec: str) -> Opened:
    """The same, with every file that cannot be read among the skipped, whether they may be or not."""
    head, settings = parsed(spec)
    if not is_set(spec):
        trace = open_trace(spec)
        if not settings and is_file_like(head) and trace.name == Path(head).stem:
            trace = trace.renamed(Path(head).name)  # as with settings: a file's name has its ending
        return Opened((Member(spec, trace),), {})
    if "name" in settings:
        raise TraceError(
            f"trace {grammar.shown(spec)}: name= is for one trace; a set's members have their files' names"
        )
    own = {key: settings.pop(key) for key in SET_SETTINGS if key in settings}
    wanted = _Wanted.of(spec, own)
    names = list(_parts(head, settings) if settings.get("part") == "all" else _files(head, settings))
    if wanted.sample is not None:
        random.Random(wanted.seed).shuffle(names)
    members: list[tuple[str, Member]] = []
    skipped: dict[str, str] = {}
    for shown, name, each in names:
        if len(members) == wanted.sample:
            break
        member = grammar.write(name, each)
        try:
            trace = open_trace(member)
        except TraceError as error:
            skipped[shown] = str(error).removeprefix(f"{Path(name).name}: ")
            continue
        if wanted.has(trace):
            members.append((shown, Member(member, trace.renamed(label(shown, each)))))
    if wanted.sample is not None and len(members) < wanted.sample and not skipped:
        raise TraceError(
            f"trace {grammar.shown(spec)}: sample={wanted.sample}, but {len(members)} traces are left; ask for fewer"
        )
    if not members and not skipped:
        raise TraceError(
            f"trace {grammar.shown(spec)}: none of its {len(names)} traces is as min_ and max_ ask; widen them"
        )
    return Opened(tuple(member for _, member in sorted(members, key=lambda pair: pair[0])), skipped)


def is_set(spec: str) -> bool:
    """Whether a spec denotes a set, rather than one trace."""
    head, settings = parsed(spec)
    if not is_file_like(head):
        return False
    file = grammar.is_file(head)
    return (grammar.is_folder(head) or grammar.is_pattern(head)) if not file else settings.get("part") == "all"


@dataclass(frozen=True)
class _Wanted:
    sample: int | None
    seed: int
    length_s: tuple[float, float]
    mean_bps: tuple[float, float]

    @classmethod
    def of(cls, spec: str, own: Mapping[str, str]) -> _Wanted:
        try:
            if own.get("skip", "on") not in ("on", "off"):
                raise TraceError(f"skip={own['skip']}; use on or off")
            for key in ("sample", "seed"):
                if key in own and not own[key].isdecimal():
                    raise TraceError(f"{key}={own[key]}; give a whole number")
            if own.get("sample") == "0":
                raise TraceError("sample=0; give 1 or more")
            inf = float("inf")
            length_s, mean_bps = (
                tuple(
                    parse(own[f"{end}_{what}"]) if f"{end}_{what}" in own else bound
                    for end, bound in (("min", 0.0), ("max", inf))
                )
                for what, parse in (("length", parse_time), ("mean", parse_rate))
            )
        except TraceError as error:
            raise TraceError(f"trace {grammar.shown(spec)}: {error}") from None
        sample = int(own["sample"]) if "sample" in own else None
        return cls(sample, int(own.get("seed", "1")), (length_s[0], length_s[1]), (mean_bps[0], mean_bps[1]))

    def has(self, trace: Trace) -> bool:
        long_enough = trace.per == "chunk" or self.length_s[0] <= trace.duration_s <= self.length_s[1]
        return long_enough and self.mean_bps[0] <= trace.mean_bps <= self.mean_bps[1]


_Name = tuple[str, str, Mapping[str, str]]
"""What a member is called in the set, its file, and its settings."""


def _files(head: str, settings: Mapping[str, str]) -> Iterator[_Name]:
    """The files of a folder and its folders, or of a pattern."""
    folder = Path(head)
    if folder.is_dir():
        paths = [path for path in folder.rglob("*") if path.is_file()]
    else:
        paths = [path for path in map(Path, glob.iglob(head, recursive=True)) if path.is_file()]
        plain = itertools.takewhile(lambda part: not grammar.is_pattern(part), folder.parts)
        folder = Path(*plain)
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise TraceError(f"{head}: no files there; give a folder that has some, or a pattern such as 'logs/*.csv'")
    if len(paths) > MAX_FILES:
        raise TraceError(f"{head}: {len(paths)} files; a set has at most {MAX_FILES}: name a folder inside")
    names = [path.name for path in paths]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    for path in sorted(paths, key=lambda path: path.as_posix()):
        yield str(path.relative_to(folder)) if path.name in twice else path.name, str(path), settings


def _parts(head: str, settings: Mapping[str, str]) -> Iterator[_Name]:
    """The parts of a file that holds several traces."""
    for part in range(formats.parts(head, settings.get("format"))):
        yield f"{Path(head).name}#{part:04d}", head, {**settings, "part": str(part)}


def _skips(spec: str) -> bool:
    return parsed(spec)[1].get("skip") == "on"


def _complaint(spec: str, found: Opened) -> str:
    """Every file that cannot be read, with its reason; files with the same one together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    said = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        said.append(f"{', '.join(names[:MAX_NAMED])}{more}: {reason}")
    count = len(found.skipped)
    return (
        f"trace {grammar.shown(spec)}: {count} of {count + len(found.members)} files cannot be read "
        "(skip=on goes on without them): " + "; ".join(said)
    )
