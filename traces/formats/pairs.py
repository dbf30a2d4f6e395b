"""What a file of two columns of numbers is: pensieve's, Lumos5G's and Oboe's look alike and mean different links.

The whole file is looked at, and by rules that cannot both hold, so that all files of a data set are recognised as the
same format. Pairs whose rates are whole numbers could be anything from bit/s to Mbit/s: none is assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers
from kvstream.traces.formats.text import Text

LIKELY_MBPS = 3000.0
"""Half of a file's rates above this are hardly Mbit/s."""
OBOE_MS = 40.0
"""A download takes longer than this, in Oboe's milliseconds; no row of the others lasts so many seconds."""
_UNIT = re.compile(r"bps|bit|byte|[kmg]b|ms\b|_s\b|\(s\)|milli|sec", re.IGNORECASE)
HOW = (
    "set unit=Mbps (or kbps, bps, MB/s; each rate from its time in s on), or format=pensieve (each until its time), "
    "lumos5g, oboe (ms, kbit/s) or purdue (bit/s)"
)


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    rows: int
    whole_rates: bool
    """Every rate is written in digits alone."""
    whole_times: bool
    rises: bool
    seconds: bool
    """Whole seconds, mostly one apart and never going back."""
    halves: bool
    """Every rate is a multiple of 0.5."""
    from_zero: bool
    downloads: bool
    """Rows in pairs (start, end) of equal rates, long enough for Oboe's."""
    constant: bool
    median_rate: float


def facts(text: Text) -> Facts | None:
    """The facts of a file of two columns of numbers; None for any other. Raises TraceError for a damaged row."""
    if numbers.width(text) != 2 or text.is_json:
        return None
    names = numbers.header(text)
    if names is not None and _UNIT.search(names[1]):
        return None  # it says what its columns are, so nothing is to be guessed
    if "pairs" not in text.known:
        with np.errstate(invalid="ignore", over="ignore"):  # of numbers too large for a float, which are refused later
            text.known["pairs"] = _facts(numbers.table(text, 2))
    return text.known["pairs"]


def _facts(table: numbers.Table) -> Facts:
    times, rates = table.columns
    steps = np.diff(times)
    starts, ends = times[::2], times[1::2]
    paired = len(table) % 2 == 0 and bool((rates[::2] == rates[1::2]).all())
    return Facts(
        rows=len(table),
        whole_rates=table.whole[1],
        whole_times=table.whole[0],
        rises=bool((steps > 0.0).all()),
        seconds=len(steps) > 0 and bool((steps >= 0.0).all() and (steps % 1 == 0.0).all() and np.median(steps) == 1.0),
        halves=bool((rates * 2 % 1 == 0.0).all()),
        from_zero=bool(times[0] == 0.0),
        downloads=paired and float(np.median(ends - starts)) >= OBOE_MS,
        constant=bool((rates == rates[0]).all()),
        median_rate=float(np.median(rates)),
    )


def is_oboe(text: Text) -> bool:
    """Pairs of equal rates that take tens of milliseconds and more."""
    found = facts(text)
    return found is not None and not found.whole_rates and found.downloads and not found.constant


def is_lumos5g(text: Text) -> bool:
    """Once a second, which may repeat, in Lumos5G's grain of 0.5 Mbit/s, and not written as pensieve's files are."""
    found = facts(text)
    if found is None or found.whole_rates or is_oboe(text):
        return False
    return found.seconds and found.halves and (found.whole_times or not found.from_zero)


def is_pensieve(text: Text) -> bool:
    """Any other file of times that rise and of rates with a point."""
    found = facts(text)
    if found is None or found.whole_rates or found.rows < 2 or is_oboe(text) or is_lumos5g(text):
        return False
    return found.rises and found.median_rate <= LIKELY_MBPS and not (found.constant and found.downloads)


def problem(text: Text) -> TraceError | None:
    """Why a file of pairs is none of these, and what to do; None for a file that has other columns."""
    found = facts(text)
    if found is None:
        return None
    if found.whole_rates:
        why = "rates in whole numbers could be bit/s, kbit/s or Mbit/s"
    elif found.rows < 2:
        why = "one pair of numbers is no trace of any known format"
    elif not found.rises:
        why = "its times do not rise (repair=sort or drop mends that; format=lumos5g takes a row a second)"
    elif found.median_rate > LIKELY_MBPS:
        why = f"rates of {found.median_rate:g} are hardly Mbit/s"
    else:
        why = "one rate in pairs of rows could be pensieve's or Oboe's"
    return TraceError(f"{text.source}: {why}: {HOW}")
