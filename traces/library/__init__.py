"""Named traces: files in our own format, each with its story and provenance, and families for policy research.

All are synthetic and ours (Apache-2.0), with means of tens of Mbit/s; `Trace.scale_to` (`scale_mean=` in a spec) moves
them elsewhere. The files are made from `recipes.RECIPES` by `python -m traces.library.recipes`.

Families are made from seeds by name, `family/markov-003`, never stored. Numbers 000 to 007 are the `tune` half, 008 to
015 the `held-out` half: choose a policy's settings on the first and report on the second. Some families are `unseen`
as a whole: none of our policies was tuned on any of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import load as load_file
from kvstream.traces.library.families import FAMILIES, UNSEEN, member
from kvstream.traces.trace import Trace

Split = Literal["tune", "held-out", "unseen"]

FOLDER = Path(__file__).parent
HALF = 8
"""Members in each half of a family."""
TEACHING = ("lab-steady", "lab-cliff", "lab-recovery", "lab-sawtooth", "lab-outage", "lab-burst")
"""The teaching traces, in the order of a lab; each has a story."""


def names() -> list[str]:
    """Names of the stored traces, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def load(name: str) -> Trace:
    """A stored trace by its name, or a member of a family by `family/NAME-NNN`. Raises TraceError."""
    if name.startswith("family/"):
        family_name, _, number = name.removeprefix("family/").rpartition("-")
        if family_name not in FAMILIES | UNSEEN or not (
            len(number) == 3 and number.isdecimal() and int(number) < 2 * HALF
        ):
            raise TraceError(
                f"unknown trace {name!r}; families are family/NAME-000 to {2 * HALF - 1:03d}, "
                f"NAME of {', '.join(FAMILIES | UNSEEN)}"
            )
        return member(family_name, int(number)).renamed(name)
    if name not in names():
        raise TraceError(f"unknown library trace {name!r}; choose from {', '.join(names())}")
    return load_file(FOLDER / f"{name}.csv", format="kvstream")


def families(split: Split | None = None) -> list[str]:
    """Names of the families, or of those that have this part."""
    if split is None:
        return [*FAMILIES, *UNSEEN]
    return list(UNSEEN if split == "unseen" else FAMILIES)


def family(name: str, split: Split) -> list[Trace]:
    """The traces of one half of a family, `tune` to choose settings on, `held-out` to report on; or all of an `unseen`
    one. Raises TraceError."""
    return [load(member_name) for member_name in family_names(name, split)]


def family_names(name: str, split: Split) -> list[str]:
    """The names of these traces, as `load` and a spec take them. Raises TraceError."""
    if split not in get_args(Split):
        raise TraceError(f"unknown split {split!r} of a family; choose from tune, held-out, unseen")
    if name not in families(split):
        raise TraceError(f"no trace family {name!r} with a split {split!r}; choose from {', '.join(families(split))}")
    numbers = {"tune": range(HALF), "held-out": range(HALF, 2 * HALF), "unseen": range(2 * HALF)}[split]
    return [f"family/{name}-{number:03d}" for number in numbers]
