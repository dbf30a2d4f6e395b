"""Files from outside, and files that are written whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvstream.testbed import files, terminal
from kvstream.testbed.errors import SpecError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("parse", [files.parse_json, files.parse_toml])
@pytest.mark.parametrize("content", ["[" * 100_000, "a = " + "9" * 5000, "a = " + "[" * 2000, "\0", b"\xff\xfe", "{"])
def test_what_cannot_be_parsed_is_one_line(parse, content):
    with pytest.raises(SpecError, match=r"^x: ") as caught:
        parse(content, "x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_byte_order_mark_is_skipped():
    assert files.parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}
    assert files.parse_toml(b"\xef\xbb\xbfa = 1", "x") == {"a": 1}


def test_a_full_disk_names_the_file_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_whole(tmp_path / "a" / "b.json", b"x", durable=True)
    assert caught.value.filename == str(tmp_path / "a" / "b.json")
    assert list((tmp_path / "a").iterdir()) == []


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path):
    files.write_whole(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("how", ["PYTHONIOENCODING=ascii", "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"])
def test_output_without_unicode(tmp_path: Path, how: str):
    script = tmp_path / "script.py"
    script.write_text("from kvstream.testbed import terminal as t; t.prepare(); print('5 – 7 ≥ 3 × ☃')", "utf-8")
    with os.popen(f"PYTHONPATH={ROOT} {how} {sys.executable} {script}") as output:
        assert output.read() == "5 - 7 >= 3 x ?\n"


def test_a_closed_output_swallows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    terminal.prepare()
    print("–")
    sys.stdout.close()
