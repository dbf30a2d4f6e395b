"""A policy in another process, with a time limit on every answer."""

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

from kvstream.policies.api import Choice, Observation, Policy, Progress, Replace
from kvstream.policies.errors import PolicyError
from kvstream.testbed.host.process import IMPORT_ROOT
from kvstream.testbed.lab import jail
from kvstream.testbed.lab.worker import observation_to_json

START_S: Final = 20.0
"""Time limit of importing the file and making a policy."""

CHOICE_S: Final = 0.25
"""Processor time of a choice, after which the process is killed. Longer than over a real link: graders' processors may
be slower."""

WAIT_S: Final = 5.0
"""A process that uses no processor time is killed after this: it sleeps, or waits for something."""

LOOK_S: Final = 0.05
"""How often it is looked at."""

MAX_ANSWER_BYTES: Final = 1 << 16


class Refused(PolicyError):
    """The policy raised, stalled, died or gave an invalid answer; the message says which."""


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
        return _WithProgress(self) if isinstance(has, dict) and has.get("progress") else _Remote(self)

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Any:
        """One request, one answer. Raises Refused."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, limit_s)
        except BrokenPipeError:
            line = b""
        if line is None:
            self._kill()
            raise Refused(f"no answer within {limit_s:g} s of processor time, or {max(WAIT_S, limit_s):g} s of waiting")
        if not line:
            code = process.wait()
            self._kill()
            raise Refused(f"the process ended (status {code}): out of memory or time, or it exited by itself")
        answer = _object(line)
        if "error" in answer:
            self.first_traceback = self.first_traceback or str(answer.get("traceback", ""))
            raise Refused(str(answer["error"]))
        if "ok" not in answer:  # the process is the student's, and so is all that it writes
            self._kill()
            raise Refused("the process wrote something else than an answer")
        return answer["ok"]

    def _line(self, process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
        """The next line; empty when the process has ended, None when time is up."""
        assert process.stdout is not None
        fd, line = process.stdout.fileno(), b""
        began_s, used_s = time.monotonic(), _processor_s(process.pid)
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], LOOK_S)
            if not ready:
                if _processor_s(process.pid) - used_s > limit_s:
                    return None
                if time.monotonic() - began_s > max(WAIT_S, limit_s) and _sleeps(process.pid):
                    return None
                continue
            if len(line) > MAX_ANSWER_BYTES:
                return None
            part = os.read(fd, MAX_ANSWER_BYTES)
            if not part:
                return b""
            line += part
        return line

    def _start(self) -> subprocess.Popen[bytes]:
        root, work = str(IMPORT_ROOT), Path(self._folder.name)
        head, comma, settings = self._spec.partition(",")
        path, colon, name = head.rpartition(":")
        is_file = path.endswith(".py")
        spec = f"{work / Path(path).name}{colon}{name}{comma}{settings}" if is_file else self._spec
        serve = [sys.executable, "-m", "kvstream.testbed.lab.worker", spec]
        self._process = subprocess.Popen(
            jail.command(Path(path) if is_file else Path(os.devnull), work, serve, jail.kind()),
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


def _object(line: bytes) -> dict[str, Any]:
    """A JSON object; an empty one where the line is none."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _processor_s(pid: int) -> float:
    """Processor time that a process has used, from its `stat` (proc(5)); where there is none, the time that passes."""
    fields = _stat(pid)
    return time.monotonic() if fields is None else sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _sleeps(pid: int) -> bool:
    """Whether a process waits for something other than a processor."""
    fields = _stat(pid)
    return fields is None or fields[0] != "R"


def _stat(pid: int) -> list[str] | None:
    """The fields of a process's `stat` after its name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


class _Remote:
    """One session's policy, asked over the pipe; none of its state is here."""

    def __init__(self, worker: RemotePolicies) -> None:
        self._worker = worker
        self._process = worker._process

    def choose(self, obs: Observation) -> Choice:
        answer = self._ask("choose", obs)
        if "invalid" in answer:
            raise Refused(f"choose answered {answer['invalid']}; return Choice(level)")
        return Choice(answer["level"], answer["chunk"], answer["reason"])

    def _ask(self, what: str, obs: Observation) -> Any:
        if self._worker._process is not self._process:
            raise Refused("its process was killed earlier in this session")
        return self._worker.ask({what: observation_to_json(obs)}, CHOICE_S)


class _WithProgress(_Remote):
    def progress(self, obs: Observation) -> Progress:
        answer = self._ask("progress", obs)
        return Replace(answer["replace"]) if isinstance(answer, dict) else answer


def _absolute(spec: str) -> str:
    """The spec with an absolute path, since the worker runs in another folder."""
    head, comma, settings = spec.partition(",")
    path, colon, name = head.rpartition(":")
    return f"{Path(path).resolve()}{colon}{name}{comma}{settings}" if path.endswith(".py") else spec
