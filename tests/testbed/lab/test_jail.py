"""What a submission can reach: nothing of the grader's, and nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvstream.policies.api import Choice
from kvstream.testbed.lab import grade, jail
from kvstream.testbed.lab.remote import Refused, RemotePolicies

ROOT = Path(__file__).resolve().parents[3]
HEAD = "import os, glob, socket, subprocess, sys, time\nfrom kvstream.policies.api import Choice\n"
PRIVATE = [str(Path.home() / name) for name in (".bashrc", ".profile", ".ssh", ".cache", ".config")]
"""The home itself may be there, if the interpreter or the checkout lies in it."""
needs_jail = pytest.mark.skipif(jail.kind() != "namespaces", reason="this machine refuses namespaces")


def said(tmp_path: Path, expression: str) -> str:
    """What a submission finds: the value of an expression, raised as an error that the grader passes on."""
    file = tmp_path / "ada.py"
    file.write_text(f"{HEAD}class P:\n    def __init__(self):\n        raise KeyError({expression})\n"
                    "    def choose(self, obs): ...\n")  # fmt: skip
    with RemotePolicies(f"{file}:P") as worker, pytest.raises(Refused) as caught:
        worker.fresh()
    return str(caught.value)


@needs_jail
def test_the_seed_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTREAM_LAB_SEED", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    everywhere = (
        "[name for name in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline')"
        " if b'hunter2' in open(name, 'rb').read()]"
    )
    assert "KeyError: []" in said(tmp_path, everywhere)
    assert "KeyError: ['1']" in said(tmp_path, "[name for name in os.listdir('/proc') if name.isdigit()]")
    assert "FileNotFoundError" in said(tmp_path, f"open({str(tmp_path / 'secret')!r}).read()")


@needs_jail
@pytest.mark.parametrize(
    ("expression", "found"),
    [
        (f"os.path.exists({str(ROOT / 'docs')!r})", "False"),
        (f"os.path.exists({str(ROOT / 'tests')!r})", "False"),
        (f"[name for name in {PRIVATE!r} if os.path.exists(name)]", "[]"),
        ("os.getuid()", str(jail.STUDENT)),
        ("open('/proc/self/status').read().split('CapEff:')[1].split()[0]", "0000000000000000"),
        ("socket.socket().connect_ex(('127.0.0.1', 9))", "101"),
        ("os.listdir('.')", "['ada.py']"),
    ],
)
def test_what_it_sees(tmp_path: Path, expression: str, found: str) -> None:
    assert found in said(tmp_path, f"str({expression})")


@needs_jail
@pytest.mark.parametrize("place", ["/usr/x", str(ROOT / "policies" / "x.py"), f"{sys.prefix}/x"])
def test_it_can_write_nothing_that_stays(tmp_path: Path, place: str) -> None:
    answer = said(tmp_path, f"open({place!r}, 'w')")
    assert "OSError" in answer or "PermissionError" in answer
    assert not Path(place).exists()


@needs_jail
def test_what_it_starts_ends_with_it(tmp_path: Path) -> None:
    mark = f"sleep 98{os.getpid()}"
    file = tmp_path / "ada.py"
    file.write_text(
        f"{HEAD}class P:\n    def choose(self, obs):\n"
        f"        subprocess.Popen({mark.split()!r}, start_new_session=True)\n        return Choice(0)\n"
    )
    from kvstream.testbed.simulator.policy_check import first_situation

    with RemotePolicies(f"{file}:P") as worker:
        assert worker.fresh().choose(first_situation()) == Choice(0, None, {})
        assert mark in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    end_s = time.monotonic() + 5.0
    while mark in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_an_empty_seed_is_none(tmp_path: Path) -> None:
    file = tmp_path / "ada.py"
    file.write_text(HEAD)
    command = [sys.executable, "-m", "kvstream.testbed.cli", "lab", "grade", str(file), "--seed-file", os.devnull]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert "the seed is empty" in done.stderr


def test_grades_say_what_kept_the_submission(tmp_path: Path) -> None:
    file = tmp_path / "ada.py"
    file.write_text(f"{HEAD}class P:\n    def choose(self, obs):\n        return Choice(0)\n")
    result = grade.grade(f"{file}:P", "secret", links_each=1)
    assert result["jail"] == jail.kind()
    assert result["practice"] is False
