"""What a run says while it goes on: one line a session on a terminal, silence in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from testbed.experiment import SESSION_S, about, predicted_s

if TYPE_CHECKING:
    from testbed.experiment import Experiment, Unit
    from testbed.results import Row


def track(items: Sequence[Any], about: str) -> Iterable[Any]:
    """The items, with a bar and the time left on a terminal's standard error; nothing is said in a pipe."""
    if not sys.stderr.isatty():
        return items
    from rich import progress
    from rich.console import Console

    return progress.track(items, about, console=Console(stderr=True), transient=True)


class Progress:
    """Plain lines; `quiet` says nothing at all. In a pipe only what is said once a run is printed."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stdout.isatty()
        self._done_s = self._left_s = 0.0
        self._left = 0
        self._begun_s = time.monotonic()

    def say(self, line: str) -> None:
        """Something the user waits for."""
        if not self._quiet:
            print(line, flush=True)

    def begin(self, experiment: Experiment, sessions: int, todo: Sequence[Unit], emulated: bool) -> None:
        """`sessions` in all; `todo` holds the unit of each that is still to run."""
        self._left, self._left_s = len(todo), predicted_s(todo)
        self._begun_s = time.monotonic()
        words = f"{experiment.name}: {len(experiment.units())} units x {len(experiment.schemes)} schemes"
        if len(todo) < sessions:
            words += f", {sessions - len(todo)} of {sessions} sessions are there already"
        if emulated and todo:
            words += f", {about(self._left_s)}"
        self.say(words)

    def place(self, words: str) -> None:
        """What runs where: the first thing to know about the numbers."""
        self.say(words)

    def step(self, row: Row) -> None:
        self._left -= 1
        self._left_s -= row.deadline_s + SESSION_S
        self._done_s += row.deadline_s + SESSION_S
        if self._quiet or not self._terminal:
            return
        rest = about(max(0.0, (time.monotonic() - self._begun_s) / self._done_s * self._left_s))
        ttft = "no first token" if row.ttft_s is None else f"TTFT {row.ttft_s:.2f} s"
        mark = row.status if row.status != "ok" else "met" if row.met else "missed"
        line = f"  {row.scheme:<18} {row.unit_id:<28} {ttft:<14} {mark:<8} {self._left} to go, {rest}"
        end = "\n" if self._left == 0 else ""
        print(f"\r\033[K{line}", end=end, flush=True)
