"""What people see on terminals of any width, with and without Unicode and colour."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.testbed import terminal

WORDS = st.lists(st.from_regex(r"[!-~]{1,12}", fullmatch=True), min_size=1, max_size=40)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@given(WORDS, st.integers(20, 200), st.sampled_from(["", "  ", "name        "]))
def test_no_word_is_cut_or_lost(words: list[str], width: int, head: str) -> None:
    text = head + " ".join(words)
    shown = terminal.wrapped(text, width)
    assert shown.split() == text.split()
    assert all(len(line) <= max(width, 32) for line in shown.split("\n"))


def test_the_rest_of_a_line_stands_under_its_last_column() -> None:
    line = "  uniform     quantisation without an entropy coder"
    assert terminal.wrapped(line, 40) == "  uniform     quantisation without an\n              entropy coder"
    assert terminal.wrapped("  a list of some more words", 22) == "  a list of some more\n  words"


def test_a_number_stays_with_its_unit() -> None:
    assert "75\n" not in terminal.wrapped("it is met in exactly 75 % of the units", 24)
    assert terminal.wrapped("it takes as much as 16 Mbit/s", 24) == "it takes as much as\n16 Mbit/s"


def test_a_wide_table_comes_in_parts() -> None:
    rows = [["scheme", "at 0.5 s", "at 1 s"], ["mine", "75 %", "100 %"]]
    assert terminal.aligned(rows) == ["scheme  at 0.5 s  at 1 s", "mine        75 %   100 %"]
    parts = [["scheme  at 0.5 s", "mine        75 %"], ["scheme  at 1 s", "mine     100 %"]]
    assert terminal.aligned(rows, width=17) == [*parts[0], "", *parts[1]]


def on_terminal(columns: int, *argv: str, cwd: Path, **environment: str) -> str:
    """Everything that a command of kvstream writes to a terminal of some columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "LC_ALL")}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstream.testbed.cli", *argv], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs,
        env=kept | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            written += (part := os.read(ours, 65536))
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
    os.close(ours)
    process.wait(60)
    return written.decode()


def seen(written: str) -> list[str]:
    """Lines as a terminal shows them before it breaks any: without escapes, and what `\\r` begins again on its own."""
    return [part for line in ESCAPE.sub("", written).split("\n") for part in line.rstrip("\r").split("\r")]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize(
    "argv",
    [
        ("simulate", "--quick"),
        ("lab", "check", "buffer-based"),
        ("lab", "explain", "steady", "3", "buffer-based"),
        ("policy", "list"),
        ("trace", "list"),
        ("trace", "show", "wifi"),
        ("simulate", "--policy", "nobody"),
    ],
    ids=" ".join,
)
def test_nothing_is_wider_than_the_terminal(tmp_path: Path, columns: int, argv: tuple[str, ...]) -> None:
    """But for what is one long word, such as the settings of a trace."""
    lines = seen(on_terminal(columns, *argv, cwd=tmp_path))
    assert len(lines) > 2
    assert [line for line in lines if len(line) > columns and " " in line.strip()] == []


def test_without_unicode_there_is_none(tmp_path: Path) -> None:
    written = on_terminal(80, "lab", "check", "buffer-based", cwd=tmp_path, LC_ALL="C")
    assert written.isascii()
    assert "?" not in written
    assert "x Exercise 1 (steady): FAILED" in ESCAPE.sub("", written)
    assert not on_terminal(80, "lab", "check", "buffer-based", cwd=tmp_path, LC_ALL="C.UTF-8").isascii()


def test_pass_and_fail_have_a_mark_and_a_colour(tmp_path: Path) -> None:
    check = ("lab", "check", "kvstream")
    written = on_terminal(80, *check, cwd=tmp_path, LC_ALL="C.UTF-8")
    assert "\x1b[1;32m✓ \x1b[0m" in written
    plain = on_terminal(80, *check, cwd=tmp_path, NO_COLOR="1", LC_ALL="C.UTF-8")
    assert "[1;32m" not in plain
    assert "✓ steady" in ESCAPE.sub("", plain)
    policy = ("policy", "check", "kvstream")
    assert "\x1b[32mok" in on_terminal(80, *policy, cwd=tmp_path)
    assert "\x1b" not in on_terminal(80, *policy, cwd=tmp_path, NO_COLOR="1")
    piped = subprocess.run([sys.executable, "-m", "kvstream.testbed.cli", *check], cwd=tmp_path, capture_output=True,
                           text=True, check=True).stdout  # fmt: skip
    assert "\x1b" not in piped
