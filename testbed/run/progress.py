"""What a run says while it goes on: one line per session on a terminal; in a pipe, one per stage of what takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvstream.testbed import terminal
from kvstream.testbed.config.experiment import about

if TYPE_CHECKING:
    from kvstream.testbed.config.experiment import Experiment, Unit
    from kvstream.testbed.results.folder import Row


def track(items: Sequence[Any], words: str) -> Iterable[Any]:
    """The items, with a bar and the time left on a terminal's standard error; in a pipe one line, after the first."""
    if not sys.stderr.isatty():
        return _told(items, words)
    from rich import progress
    from rich.console import Console

    return progress.track(items, words, console=Console(stderr=True), transient=True)


def _told(items: Sequence[Any], words: str) -> Iterable[Any]:
    begun_s = time.monotonic()
    for done, item in enumerate(items):
        if done == 1:
            left_s = (time.monotonic() - begun_s) * (len(items) - 1)
            print(f"{words}: 1 of {len(items)} done, {about(left_s)} to go", file=sys.stderr, flush=True)
        yield item


class Progress:
    """Plain lines; `quiet` says nothing at all. In a pipe, only what is said once per run is printed."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stdout.isatty()
        self._done_s = self._left_s = self._session_s = 0.0
        self._left = 0
        self._begun_s = time.monotonic()

    def say(self, line: str) -> None:
        """Something the user waits for."""
        if not self._quiet:
            terminal.say(line)

    def track(self, items: Sequence[Any], words: str) -> Iterable[Any]:
        """The items, while the user is told how many are done."""
        return items if self._quiet else track(items, words)

    def begin(
        self, experiment: Experiment, sessions: int, todo: Sequence[Unit], emulated: bool, part: str = ""
    ) -> None:
        """`sessions` in all, or in this part; `todo` holds the unit of each that is still to run."""
        self._left, self._left_s = len(todo), experiment.predicted_s(todo)
        self._session_s = experiment.session_s
        self._begun_s = time.monotonic()
        words = f"{experiment.name}: {experiment.size}{part}"
        if len(todo) < sessions:
            words += f", {sessions - len(todo)} of {sessions} sessions are already done"
        if emulated and todo:
            words += f", {about(self._left_s)}"
        self.say(words)

    def place(self, words: str) -> None:
        """What runs where: the first thing to know about the numbers."""
        self.say(words)

    def step(self, row: Row) -> None:
        self._left -= 1
        self._left_s -= row.deadline_s + self._session_s
        self._done_s += row.deadline_s + self._session_s
        if self._quiet or not self._terminal:
            return
        rest = about(max(0.0, (time.monotonic() - self._begun_s) / self._done_s * self._left_s))
        ttft = "no first token" if row.ttft_s is None else f"TTFT {row.ttft_s:.2f} s"
        mark = row.status if row.status != "ok" else "met" if row.met else "missed"
        facts = [f"{row.scheme:<18}", f"{row.unit_id:<28}", f"{ttft:<14}", f"{mark:<8}", f"{self._left} to go, {rest}"]
        room = (terminal.columns() or 80) - 3
        while len(" ".join(facts)) > room and len(facts) > 1:
            facts.pop(1 if len(facts) == 5 else 0)  # the unit first: its name is the longest
        end = "\n" if self._left == 0 else ""
        print(f"\r\033[K  {' '.join(facts)[:room]}", end=end, flush=True)
