"""Policies that would hang a command or end it: refused in one line; those that only import much: left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstream.codec.errors import CodecError
from kvstream.policies.errors import PolicyError
from kvstream.testbed.simulator import trial
from kvstream.testbed.simulator.trial import try_codec, try_policy

CODEC = (
    "from kvstream import Codec, Level\nclass P(Codec):\n    codec_id = 'p'\n    levels = (Level('a'),)\n"
    "    def _decode(self, chunk, target): ...\n    def _encode(self, kv, level, header):\n        "
)
CHOOSE = "class P:\n    def choose(self, obs):\n        "


def written(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text("import os, sys, time\nfrom kvstream.policies.api import Choice\n" + text)
    return f"{file}:P"


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass\n",
        "class P:\n    def __init__(self):\n        time.sleep(1000)\n    def choose(self, obs): ...\n",
        "os.fork() or os.setsid()\nwhile True: pass\n",
    ],
)
def test_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(trial, "TRIAL_S", 2.0)
    with pytest.raises(PolicyError, match="does not get to its first choice"):
        try_policy(written(tmp_path, text))
    everything = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in everything, "what it started has outlived it"


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("os._exit(3)\n", "status 3"),
        (CHOOSE + "os._exit(0)\n", "status 0"),
        (CHOOSE + "os.kill(os.getpid(), 11)\n", "SIGSEGV"),
    ],
)
def test_what_ends_its_process(tmp_path: Path, text: str, how: str) -> None:
    with pytest.raises(PolicyError, match=how):
        try_policy(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "sys.exit(3)\n",
        "raise KeyError\n",
        "class P:\n    def __init__(self):\n        raise BaseException('x')\n",
        CHOOSE + "raise SystemExit(4)\n",
        CHOOSE + "print('tried'); return Choice(0)\n",
        CHOOSE + "while True: pass\n",
    ],
)
def test_what_raises_is_reported_where_it_is_used(tmp_path: Path, text: str) -> None:
    try_policy(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("while True: pass\n", "does not get to its first chunk within 5 s"),
        ("os._exit(3)\n", "status 3"),
        (CODEC + "os.kill(os.getpid(), 11)\n", "SIGSEGV"),
    ],
)
def test_a_codec_that_would_hang_or_end_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, how: str
) -> None:
    pytest.importorskip("torch", reason="needs torch, from the extra [run]")
    if how.endswith("5 s"):
        monkeypatch.setattr(trial, "TRIAL_S", 5.0)
    with pytest.raises(CodecError, match=how):
        try_codec(written(tmp_path, text))
    try_codec(written(tmp_path, CODEC + "raise KeyError\n"))


def test_our_own_need_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trial.subprocess, "run")
    try_policy("cachegen")
    try_codec("cachegen,coder=ac")


def test_an_import_within_a_choice_is_not_torn_apart(tmp_path: Path) -> None:
    spec = written(tmp_path, CHOOSE + "import torch; return Choice(int(torch.argmax(torch.tensor([1.0]))))\n")
    command = [sys.executable, "-m", "kvstream.testbed.cli", "policy", "check", spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert all("takes less than" in line for line in failed), done.stdout


def test_a_status_of_the_policy_is_not_ours(tmp_path: Path) -> None:
    spec = written(tmp_path, CHOOSE + "sys.exit(3)\n")
    command = [sys.executable, "-m", "kvstream.testbed.cli", "policy", "check", spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "SystemExit" in done.stdout
