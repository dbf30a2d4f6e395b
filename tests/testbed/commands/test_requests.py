"""`kvstream requests` as users type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstream.testbed.cli import main
from kvstream.testbed.workloads.request_trace import SAMPLE

SMALL = ("requests", "--count", "150", "--repetitions", "4", "--fleet", "receivers=2,cache=0")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_prints_goodput_and_writes_results_and_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--deadline", "1s"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("SIMULATOR, SYNTHETIC workload")
    assert "ours-lowest serves" in said
    body = json.loads(Path("runs/requests/requests.json").read_text())
    assert [curve["scheme"] for curve in body["curves"]] == ["text", "8-bit", "cachegen", "ours", "ours-lowest"]
    for curve in body["curves"]:
        rates = [point["rate"] for point in curve["points"]]
        assert rates == sorted(rates)
        assert all(point["low"] <= point["met_rate"] <= point["high"] for point in curve["points"])
        at_90, at_99 = curve["goodput"]
        assert at_90["rate"] >= (at_99["rate"] or 0.0)
    assert Path("runs/requests/attainment.svg").is_file()


def test_a_file_options_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine.jsonl").write_text("".join(SAMPLE.read_text().splitlines(keepends=True)[:50]))
    (tmp_path / "in" / "mine.toml").write_text('requests = "mine.jsonl"\ncount = 60\nrepetitions = 4\nrates = [3]\n')
    assert main(["requests", "in/mine.toml", "--policy", "lowest", "--arrivals", "trace", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["spec"]["name"], body["requests"]["trace"]) == ("mine", "mine.jsonl")
    assert [point["rate"] for point in body["curves"][0]["points"]] == [3.0]
    assert body["curves"][0]["policy"] == "lowest"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rate", "2"), "slots=1,cache=0"),
        (("--fleet", "receivers=8,slots=1,cache=0"), "give the rates"),
        (("--fleet", "receivers=8,slots=1,cache=0,link=own", "--rate", "2"), "share the link"),
        (("--fleet", "receivers=8,slots=1,cache=0", "--rate", "0.1"), "a smaller --count"),
    ],
    ids=range(4),
)
def test_what_real_receivers_cannot_do_is_one_line(
    options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["requests", "--emulated", *options]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert says in said.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--requests", "none.jsonl"), "no such request trace"), (("--fleet", "receivers=0"), "receivers=0"),
        (("--fleet", "gpus=3"), "unknown setting 'gpus'"), (("--rate", "0"), "rate is 0"),
        (("--policy", "oracle"), "sees the future"), (("--policy", "fixed,level=9"), "level 9"),
        (("--order", "lifo"), "unknown order"), (("--arrivals", "never"), "unknown arrivals"),
        (("--trace", "paper-uniform"), "rate for each chunk"), (("--name", "a/b"), "name"),
        (("--policy", "lowest", "--policy", "lowest"), "two schemes"), (("none.toml",), "none.toml"),
    ],
    ids=range(12),
)  # fmt: skip
def test_bad_input_is_one_line(options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *options]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert says in said.err
    assert not Path("runs").exists()
