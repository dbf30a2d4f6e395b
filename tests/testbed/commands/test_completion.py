"""The completion script, run in a real bash."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from kvstream.testbed.cli import build_parser
from kvstream.testbed.commands import completion

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture(scope="module")
def script() -> str:
    return completion.script(build_parser(), "bash", completion.names())


def complete(script: str, line: str) -> list[str]:
    """What bash offers at the end of `line`."""
    words = [*shlex.split(line), *([""] if line.endswith(" ") else [])]
    array = " ".join(shlex.quote(word) for word in words)
    code = (
        f"{script}\nCOMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _kvstream; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_commands(script):
    assert complete(script, "kvstream simu") == ["simulate"]
    assert {"run", "trace", "doctor"} <= set(complete(script, "kvstream "))


def test_subcommands_and_options(script):
    assert complete(script, "kvstream trace li") == ["list"]
    assert "--fail-if" in complete(script, "kvstream run --f")
    assert complete(script, "kvstream policy check buffer") == ["buffer-based"]


def test_values_of_options(script):
    assert complete(script, "kvstream simulate --policy buffer") == ["buffer-based"]
    assert "steady" in complete(script, "kvstream run --trace st")


def test_where_nothing_is_known_files_are_left_to_bash(script):
    assert complete(script, "kvstream report ru") == []
