"""What needs no extra really needs none: commands run while every package of the extras is hidden."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.pages import ROOT

HIDDEN_TOO = ("tokenizers", "huggingface_hub", "matplotlib", "triton")
"""Come with packages of the extras."""

PROGRAM = """
import sys
hidden = set(sys.argv.pop(1).split())
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
from testbed.cli import main
sys.exit(main(sys.argv[1:]))
"""


def extras() -> set[str]:
    """Import names of what only extras bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [name for extra in ("run", "torchac") for name in project["optional-dependencies"][extra]]
    return {name.partition(">")[0].partition("=")[0] for name in names} | set(HIDDEN_TOO)


def kvstream(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
    command = [sys.executable, "-c", PROGRAM, " ".join(sorted(extras())), *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


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
    assert (tmp_path / "runs" / "mine-quick" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("argv", [["codec", "list"], ["store", "docs"]], ids=lambda argv: argv[0])
def test_what_needs_an_extra_says_which(tmp_path, argv):
    done = kvstream(tmp_path, *argv)
    assert done.returncode == 4
    assert "pip install 'kvstream[run]'" in done.stderr
