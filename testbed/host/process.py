"""The two processes of an emulated run, as seen from the one that controls them: one JSON object per line each way."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import kvstream
from kvstream.testbed.errors import MachineError, SpecError

IMPORT_ROOT: Final = Path(kvstream.__file__).resolve().parent.parent
"""The folder that a child process needs on its path to import kvstream: of a checkout, or site-packages."""

PR_SET_PDEATHSIG: Final = 1
READY_S: Final = 120.0
"""Loading a model and compiling code take long on a busy machine."""

Start = Callable[..., "subprocess.Popen[str]"]


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Process:
    """A child that prints one JSON line when it is ready, and then answers one line to each line."""

    def __init__(self, name: str, start: Start, argv: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with log.open("a") as errors:
            self._child = start(
                [sys.executable, *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._ready: dict[str, Any] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def await_ready(self) -> dict[str, Any]:
        """What it said when it was ready. Several can be started before one is waited for. Raises MachineError if it
        ended before."""
        if self._ready is None:
            self._ready = self._answer(READY_S)
        return self._ready

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, command: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises SpecError for what it refuses, MachineError if it is gone."""
        assert self._child.stdin is not None
        self.await_ready()
        try:
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        answer = self._answer(timeout_s)
        if not answer.get("ok"):
            raise SpecError(f"{self.name}: {answer.get('error')}")
        return answer

    def close(self) -> None:
        """End the child, gently first."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.terminate()
        try:
            self._child.wait(2)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise MachineError(f"the {self.name} did not answer within {timeout_s:g} s; see {self._log}") from None
        if line is None:
            self._lines.put(None)
            raise self._gone()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self) -> MachineError:
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return MachineError(f"the {self.name} died: {last[0]} (more in {self._log})")
