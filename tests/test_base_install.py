"""What needs no extra really needs none: commands run while every package of the extras is hidden."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.store.layout import encodings, level_of
from kvstream.testbed.store.store import Store
from tests.pages import ROOT

HIDDEN_TOO = ("tokenizers", "huggingface_hub", "triton")
"""Come with packages of the extras."""

PROGRAM = """
import sys
hidden = set(sys.argv.pop(1).split())
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
from kvstream.testbed.cli import main
sys.exit(main(sys.argv[1:]))
"""


def extras(*names: str) -> set[str]:
    """Import names of what only these extras bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [line for extra in names for line in project["optional-dependencies"][extra]]
    return {line.partition(">")[0].partition("=")[0] for line in wanted if "[" not in line}


EVERY = extras("plot", "run", "torchac", "s3") | set(HIDDEN_TOO)


def call(folder: Path, *argv: str, hidden: set[str] = EVERY) -> dict[str, Any]:
    """How to run a command with packages hidden."""
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
    command = [sys.executable, "-c", PROGRAM, " ".join(sorted(hidden)), *argv]
    return {"args": command, "cwd": folder, "env": environment, "text": True}


def kvstream(folder: Path, *argv: str, hidden: set[str] = EVERY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**call(folder, *argv, hidden=hidden), capture_output=True, check=False)


def test_the_way_of_a_student(tmp_path):
    for argv in (
        ["policy", "new", "my-policy"],
        ["policy", "check", "./my_policy.py:MyPolicy"],
        ["trace", "show", "wifi"],
        ["simulate", "--quick", "--name", "mine", "--policy", "./my_policy.py:MyPolicy", "--policy", "oracle"],
        ["lab", "start", "work"],
    ):
        done = kvstream(tmp_path, *argv)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
    report = (tmp_path / "runs" / "mine-quick" / "report.html").read_text(encoding="utf-8")
    assert len(report) > 10_000
    assert "pip install -e '.[plot]'" in report.replace("&#x27;", "'")


def test_the_extra_plot_is_enough_for_figures(tmp_path):
    """The light job of CI: a report with figures, and no torch."""
    call = (
        "simulate",
        "--quick",
        "--name",
        "mine",
        "--policy",
        "buffer-based",
        "--policy",
        "oracle",
        "--trace",
        "wifi",
    )
    done = kvstream(tmp_path, *call, hidden=EVERY - extras("plot"))
    assert done.returncode == 0, done.stderr
    assert {file.suffix for file in (tmp_path / "runs" / "mine-quick" / "figures").iterdir()} == {".svg", ".png"}


def test_a_sender_needs_no_extra(tmp_path):
    """A machine that only serves contexts has no torch."""
    from tests.testbed import made

    store, manifest = Store(tmp_path / "store"), made.even(2, (10, 20))
    with store.draft(manifest.context) as draft:
        for key, size in encodings(manifest):
            chunk, _, level = key.partition("/")
            draft.put_chunk(int(chunk), level_of(level), bytes(size))
        draft.publish(manifest)
    process = subprocess.Popen(**call(tmp_path, "serve", "store", "--port", "0", "--json"), stdout=subprocess.PIPE)
    try:
        port = json.loads(process.stdout.readline())["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/contexts/made/chunks/1/1", timeout=10) as answer:
            assert answer.read() == bytes(20)
    finally:
        process.terminate()
        process.communicate(timeout=10)


@pytest.mark.parametrize("argv", [["codec", "list"], ["store", "docs"]], ids=lambda argv: argv[0])
def test_what_needs_an_extra_says_which(tmp_path, argv):
    done = kvstream(tmp_path, *argv)
    assert done.returncode == 4
    assert "pip install -e '.[run]'" in done.stderr
