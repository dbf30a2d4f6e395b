"""The environments of `scripts/engines.sh`, and programs that run in them and answer line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
START_S = 600.0
"""vLLM imports for minutes on a machine that does other things too."""
ANSWER_S = 300.0


def folder_of(engine: str) -> Path:
    """Where an engine's environment is, or would be."""
    return Path(os.environ.get("KVSTREAM_ENGINES") or ROOT / ".engines") / engine


def is_set_up(engine: str) -> bool:
    return (folder_of(engine) / ".kvstream-setup").is_file()


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; skips where there is none."""
    if not is_set_up(engine):
        pytest.skip(f"no environment with {engine} in {folder_of(engine)}; set one up: scripts/engines.sh {engine}")
    return folder_of(engine) / "bin" / "python"


def environment(**more: str) -> dict[str, str]:
    """Of a program in an engine's environment: this tree's kvstream, and no network for models."""
    names = ("PATH", "HOME", "XDG_CACHE_HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | more


class Program:
    """A program that answers every line of JSON with one."""

    def __init__(
        self, command: list[str], log: Path, *, start: Callable[..., Any] = subprocess.Popen, **more: str
    ) -> None:
        """`start` is Popen or like it; `more` goes into the program's environment."""
        self._log = log
        self._file = log.open("wb")
        self._process = start(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            cwd=ROOT,
            env=environment(**more),
            text=True,
        )

    def read(self, limit_s: float) -> Any:
        killer = threading.Timer(limit_s, self._process.kill)
        killer.start()
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
        finally:
            killer.cancel()
        if not line:
            raise AssertionError(f"the program ended or took over {limit_s:g} s; its last words:\n{self.tail()}")
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.read(ANSWER_S)

    def tail(self, characters: int = 6000) -> str:
        return self._log.read_text(errors="replace")[-characters:]

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.close()


@contextmanager
def running(program: Program) -> Iterator[Program]:
    """A program that has said that it is ready."""
    try:
        program.read(START_S)
        yield program
    finally:
        program.close()


def versions(python: Path, *packages: str) -> dict[str, str]:
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@contextmanager
def sender(store: Path, *arguments: str, port: int = 0) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A sender process of this environment, and its port."""
    command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(store), "--port", str(port)]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield int(json.loads(process.stdout.readline())["port"]), process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
