"""Schemes and units: what is compared, on what, by which names and in which order."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,()-]{0,99}")
"""Of a scheme: part of file names, which artefacts of CI systems may have too."""
SHOWN = 40
"""Characters of a trace's name in a unit's."""


@dataclass(frozen=True)
class Scheme:
    """One row of the table: a policy on a codec, and how it is driven."""

    policy: str
    """A name or a file with a class, and settings. Example: `"./mine.py:MyPolicy,safety=0.6"`."""
    codec: str
    """A name or a file with a class, and settings. Example: `"cachegen,coder=ac"`."""
    depth: int = 2
    """Requests at once: 1 chooses when a chunk has arrived, as the paper does; 2 keeps the link busy. Example: `1`."""
    overlap: bool = True
    """Chunks are decoded while later ones arrive. Example: `false`."""
    label: str = ""
    """The scheme's name in tables, instead of one made of policy and settings. Example: `"mine"`."""
    reference: bool = False
    """A reference line: runs on a few units only, and is compared with nothing. Example: `true`."""

    @property
    def name(self) -> str:
        """The row's name, unique in an experiment and safe as a file name: `MyPolicy(safety=0.6)`."""
        if self.label:
            return self.label
        name = called(self.policy)
        return name + ("" if self.depth == 2 else f"-depth{self.depth}") + ("" if self.overlap else "-no-overlap")


def called(spec: str) -> str:
    """`./mine.py:MyPolicy,safety=0.6` as `MyPolicy(safety=0.6)`."""
    head, _, settings = spec.partition(",")
    name = safe(head.rpartition(":")[2] if ".py:" in head else head)
    return f"{name}({safe(settings.replace(' ', ''), '=,')})" if settings else name


def told_apart(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """The schemes, with a label for those without one that would have the same name: the codec or the policy's file is
    added where it differs."""
    names = [scheme.name for scheme in schemes]
    named = []
    for scheme in schemes:
        alike = [other for other in schemes if other.name == scheme.name]
        label = scheme.label
        if not label and names.count(scheme.name) > 1:
            if len({_file(other) for other in alike}) > 1 and _file(scheme):
                label = f"{safe(_file(scheme))}.{scheme.name}"
            if len({other.codec for other in alike}) > 1:
                label = f"{label or scheme.name}-{called(scheme.codec)}"
        named.append(replace(scheme, label=label))
    return tuple(named)


def _file(scheme: Scheme) -> str:
    """Name of the policy's file, without folders; empty where it is in none."""
    path = scheme.policy.partition(",")[0].rpartition(":")[0]
    return Path(path).stem if path.endswith(".py") else ""


@dataclass(frozen=True)
class Unit:
    """One situation that every scheme runs in."""

    index: int
    context: str
    trace: str
    """The trace's name in tables, unique in an experiment: without folders, which differ between machines."""
    offset_s: float
    deadline_s: float
    link: str
    seed: int
    trace_sha256: str = ""
    """Of the trace's content: what it is, whatever its file is called."""

    @property
    def unit_id(self) -> str:
        """Readable, and unique by a hash of what the unit is."""
        trace = self.trace_sha256 or self.trace
        facts = repr((self.context, trace, self.offset_s, self.deadline_s, self.link, self.seed))
        context = Path(self.context).stem if self.context.endswith(".json") else self.context
        offset = f"+{self.offset_s:g}s" if self.offset_s else ""
        name = f"{safe(context)}-{safe(self.trace.partition(',')[0])[:SHOWN]}{offset}"
        return f"{self.index:03d}-{name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def dealt(units: Iterable[Unit], seed: int) -> list[Unit]:
    """The units in the order in which they run: links and traces take turns, each with its own units in random order.

    Whenever a run ends early, what it has is spread over all of them.
    """
    piles: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        piles.setdefault((unit.link, unit.trace), []).append(unit)
    drawn = random.Random(f"{seed}/units")
    for pile in piles.values():
        drawn.shuffle(pile)
    order = list(piles.values())
    drawn.shuffle(order)
    return [pile[turn] for turn in range(max(map(len, order), default=0)) for pile in order if turn < len(pile)]


def safe(text: str, more: str = "") -> str:
    """The text with dashes for what file names or artefacts of CI systems may not have, but for `more`."""
    return re.sub(rf"[^A-Za-z0-9._+{more}-]+", "-", text)
