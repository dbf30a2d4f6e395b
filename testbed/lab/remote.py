"""Asking a policy that runs in another process, with a time limit on every answer."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from policies.api import Choice, Observation, Policy, Progress, Replace
from policies.errors import PolicyError
from testbed.lab.worker import observation_to_json

START_S: Final = 20.0
"""What importing the file and making a policy may take."""

CHOICE_S: Final = 0.25
"""What a choice may take before the process is given up. Longer than over a real link: a grader's machine is busy."""

MOST_ANSWER_BYTES: Final = 1 << 16


class Refused(PolicyError):
    """The policy raised, stalled, died or answered nonsense; the message says which."""


class RemotePolicies:
    """A worker process; `fresh()` gives a new policy in it. A worker that stalls or dies is replaced."""

    def __init__(self, spec: str) -> None:
        self._spec = _absolute(spec)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="kvstream-lab-")
        self.first_traceback = ""

    def __enter__(self) -> RemotePolicies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._kill()
        self._folder.cleanup()

    def fresh(self) -> Policy:
        """A new policy object in the worker. Raises Refused if the file cannot be used at all."""
        has = self.ask({"new": True}, START_S)
        return _WithProgress(self) if has["progress"] else _Remote(self)

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Any:
        """One request, one answer. Raises Refused."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, time.monotonic() + limit_s)
        except BrokenPipeError:
            line = b""
        if line is None:
            self._kill()
            raise Refused(f"no answer within {limit_s:g} s")
        if not line:
            code = process.wait()
            self._kill()
            raise Refused(f"the process ended (status {code}): out of memory or time, or it left by itself")
        answer = json.loads(line)
        if "error" in answer:
            self.first_traceback = self.first_traceback or answer["traceback"]
            raise Refused(answer["error"])
        return answer["ok"]

    def _line(self, process: subprocess.Popen[bytes], end_s: float) -> bytes | None:
        """The next line; empty when the process has ended, None when time is up."""
        assert process.stdout is not None
        fd, line = process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0.0, end_s - time.monotonic()))
            if not ready or len(line) > MOST_ANSWER_BYTES:
                return None
            part = os.read(fd, MOST_ANSWER_BYTES)
            if not part:
                return b""
            line += part
        return line

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "testbed.lab.worker", self._spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "PYTHONPATH": root,
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONHASHSEED": "0",
                "OPENBLAS_NUM_THREADS": "1",
                "HOME": self._folder.name,
            },
            start_new_session=True,
        )
        return self._process

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class _Remote:
    """One session's policy, asked over the pipe; None of its state is here."""

    def __init__(self, worker: RemotePolicies) -> None:
        self._worker = worker
        self._process = worker._process

    def choose(self, obs: Observation) -> Choice:
        answer = self._ask("choose", obs)
        if "nonsense" in answer:
            raise Refused(f"choose answered {answer['nonsense']}; return Choice(level)")
        return Choice(answer["level"], answer["chunk"], answer["reason"])

    def _ask(self, what: str, obs: Observation) -> Any:
        if self._worker._process is not self._process:
            raise Refused("its process was ended earlier in this session")
        return self._worker.ask({what: observation_to_json(obs)}, CHOICE_S)


class _WithProgress(_Remote):
    def progress(self, obs: Observation) -> Progress:
        answer = self._ask("progress", obs)
        return Replace(answer["replace"]) if isinstance(answer, dict) else answer


def _absolute(spec: str) -> str:
    """The worker runs elsewhere, so the file needs its whole path."""
    head, comma, settings = spec.partition(",")
    path, colon, name = head.rpartition(":")
    return f"{Path(path).resolve()}{colon}{name}{comma}{settings}" if path.endswith(".py") else spec
