"""Runs written by earlier versions stay readable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvstream.testbed import cli
from kvstream.testbed.results.folder import Run

KEPT = Path(__file__).with_name("kept")


@pytest.mark.parametrize(
    ("name", "schemes", "met"),
    [
        ("simulated", ["buffer-based", "oracle", "fixed-lowest"], [2, 2, 2]),
        ("emulated", ["kvstream", "fixed-lowest"], [1, 2]),
    ],
)
def test_the_report_of_a_kept_run(name, schemes, met, tmp_path, capsys):
    run = Path(shutil.copytree(KEPT / name, tmp_path / name))
    assert cli.main(["report", str(run), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [entry["scheme"] for entry in summary["schemes"]] == schemes
    assert [entry["met"] for entry in summary["schemes"]] == met
    assert (run / "report.html").stat().st_size > 100_000
    chunks = [json.loads(line) for line in (run / "chunks.jsonl").read_text().splitlines()]
    assert len(chunks) == 16 * 2 * len(schemes)


def test_fields_that_were_renamed_are_read_under_their_new_names():
    rows = Run.open(KEPT / "emulated").rows()
    assert all(row["slowdown"]["decode"] > 1.0 for row in rows)
    assert not any("strain" in row for row in rows)
