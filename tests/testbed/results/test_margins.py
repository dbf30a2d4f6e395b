"""Margins between two runs: when they are violated, and which are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvstream.testbed.cli import main
from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import margins
from kvstream.testbed.results.paired import changes
from tests.testbed.made_run import make_run


def units(n: int, late_before: int, late_after: int, distortion_after: float = 0.02) -> list[dict[str, dict]]:
    """Units on a trace each: the first `late_before` miss the deadline before, the first `late_after` after."""
    noise = random.Random(1)
    common = {"answers_right": 3, "answers": 4, "measured_kl": None, "bytes": 100}

    def row(late: bool, distortion: float, trace: int) -> dict:
        value = distortion + 0.001 * noise.random()
        return {"met": not late, "distortion": value, "ttft_s": 1.0 + late, "trace": str(trace), **common}

    return [
        {"before": row(i < late_before, 0.02, i), "after": row(i < late_after, distortion_after, i)} for i in range(n)
    ]


def judged(text: str, counted: list[dict[str, dict]]) -> margins.Judged:
    return margins.judge(margins.parse(text), changes(counted, "after", "before"))


@pytest.mark.parametrize(
    ("after", "worse", "may_be_worse"),
    [(30, True, True), (8, False, True), (4, False, False), (0, False, False)],
    ids=["much worse", "perhaps worse", "the same", "better"],
)
def test_worse_must_be_shown_and_may_be_worse_must_be_ruled_out(after, worse, may_be_worse):
    counted = units(60, late_before=4, late_after=after)
    assert judged("mine.violations worse by 0.1", counted).is_violated == worse
    assert judged("mine.met worse by 10%", counted).is_violated == worse
    assert judged("mine.violations may be worse by 0.1", counted).is_violated == may_be_worse
    assert judged("mine.met may be worse by 0.1", counted).is_violated == may_be_worse


@pytest.mark.parametrize(
    ("text", "violated"),
    [
        ("mine.distortion worse by 0.001", True),
        ("mine.distortion worse by 0.005", False),
        ("mine.distortion worse by 5%", True),  # of what it was
        ("mine.distortion may be worse by 20%", False),
        ("mine.ttft worse by 1ms", False),
        ("mine.bytes may be worse by 1B", False),
        ("mine.answers worse by 0.1", False),
        ("mine.measured_kl worse by 1", True),  # not measured
    ],
)
def test_margins_have_the_unit_of_their_metric(text, violated):
    assert judged(text, units(20, 0, 0, distortion_after=0.022)).is_violated == violated


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mine.violations>0.1", "compare judges differences; write 'SCHEME.METRIC worse by MARGIN'"),
        ("mine.speed worse by 1", "unknown metric 'speed'; choose from violations"),
        ("mine.violations worse by 5", "a share from 0 to 1; 5 % is 0.05"),
        ("mine.ttft worse by 5", "'5' has no unit"),
        ("mine.distortion worse by -1", "0 or more"),
    ],
)
def test_malformed_margins_are_refused(text, says):
    with pytest.raises(SpecError, match=says):
        margins.parse(text)


@pytest.mark.parametrize(
    ("text", "n", "says"),
    [
        ("mine.violations worse by 0.05", 3, "need 4 traces or more; the runs have 3"),
        ("mine.violations worse by 0.8", 8, "cannot fail with 8 units on 8 traces"),
        ("mine.violations may be worse by 0.05", 8, "use at least 38 traces, a margin above 0.2, or"),
        ("yours.violations worse by 0.05", 8, "unknown scheme 'yours'; choose from mine"),
    ],
)
def test_what_the_units_cannot_decide_is_refused(text, n, says):
    with pytest.raises(SpecError, match=says):
        margins.check([margins.parse(text)], ["mine"], [str(i) for i in range(n)])


def test_as_many_traces_as_the_hint_says_decide_and_one_fewer_do_not():
    margin = [margins.parse("mine.violations may be worse by 0.05")]
    margins.check(margin, ["mine"], [str(i) for i in range(38)])
    with pytest.raises(SpecError, match="use at least 38 traces"):
        margins.check(margin, ["mine"], [str(i) for i in range(37)])


def test_the_command_judges_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, spoil=False).path for name in ("old", "new")]
    for cell in (runs[1] / "cells").glob("*-cachegen.json"):
        body = json.loads(cell.read_text())
        body["row"]["distortion"] += 0.01
        cell.write_text(json.dumps(body))
    junit, markdown = tmp_path / "x.xml", tmp_path / "x.md"
    markdown.write_text("before\n")
    limits = ("cachegen.distortion worse by 0.005", "text.distortion may be worse by 0.001")
    files = ("--junit", str(junit), "--markdown", str(markdown))
    assert main(["compare", *map(str, runs), *(f"--fail-if={limit}" for limit in limits), *files]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("cachegen: distortion before 0.00")
    assert "paired +0.01 [+0.01, +0.01]" in said.out.splitlines()[0]
    assert "threshold violated: cachegen.distortion worse by 0.005: +0.01 [+0.01, +0.01] nats: shown" in said.err
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "0")
    assert float(suite.get("time", "0")) == pytest.approx(sum(float(case.get("time", "0")) for case in suite))
    assert [case.get("name") for case in suite if case.find("failure") is not None] == [limits[0]]
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert f"| `{limits[0]}` | ❌ violated |" in text
    assert f"| `{limits[1]}` | ✅ kept |" in text
    assert "| fixed-highest@old |" in text
