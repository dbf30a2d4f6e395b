"""The traces of an experiment: sets, names, offsets, and what a run's manifest says of them."""

from __future__ import annotations

import json
import shutil

import pytest

from kvstream.testbed import cli
from kvstream.testbed.config import experiment
from kvstream.testbed.errors import SpecError
from kvstream.traces.errors import TraceError

BASE = {
    "name": "e",
    "contexts": ["docs"],
    "traces": ["logs"],
    "deadlines_s": [1.0],
    "schemes": [{"policy": "fixed,level=lowest", "codec": "kvstream"}],
}


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    """A folder with two measured traces, one of them named like one elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name, mbps in (("logs/bw=5/t_1", 5), ("logs/bw=9/t_1", 9), ("logs/bw=9/t_2", 10)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(f"{t}.0\t{mbps + t % 3}.013\n" for t in range(301)))
    return tmp_path


def units(**changes):
    return experiment.from_dict(BASE | changes).units()


def test_a_set_makes_a_unit_of_each_member_named_by_its_file(laboratory):
    assert [unit.trace for unit in units()] == ["bw=5/t_1", "bw=9/t_1", "t_2"]
    assert [unit.trace for unit in units(traces=["logs/bw=9"])] == ["t_1", "t_2"]
    assert units()[2].unit_id.startswith("002-docs-t_2-")


def test_units_are_the_same_in_a_laboratory_with_other_folders(laboratory, tmp_path):
    here = units(traces=["logs/bw=9"])
    shutil.copytree("logs/bw=9", "elsewhere/deep")
    there = units(traces=[f"{tmp_path}/elsewhere/deep"])
    assert here == there
    assert [unit.unit_id for unit in here] == [unit.unit_id for unit in there]
    (tmp_path / "elsewhere/deep/t_1").write_text("0.0 1.5\n300.0 2.25\n")
    changed = units(traces=["elsewhere/deep"])
    assert changed[0].unit_id != here[0].unit_id, "the content says what a trace is, not its name"
    assert changed[1].unit_id == here[1].unit_id


def test_random_offsets_are_drawn_for_each_trace_and_repetition(laboratory):
    drawn = units(offsets="random", repetitions=3)
    offsets = [unit.offset_s for unit in drawn]
    assert len(set(offsets)) == len(offsets) == 9
    assert all(0.0 <= offset_s < 300.0 for offset_s in offsets)
    assert offsets == [unit.offset_s for unit in units(offsets="random", repetitions=3)]
    assert offsets != [unit.offset_s for unit in units(offsets="random", repetitions=3, seed=2)]
    assert f"+{offsets[0]:g}s-" in drawn[0].unit_id
    ending = units(traces=["logs/bw=9/t_2,end=stop,take=1.5s"], offsets="random", repetitions=20)
    assert all(unit.offset_s <= 0.5 for unit in ending)
    assert {unit.offset_s for unit in units(traces=["paper-uniform"], offsets="random")} == {0.0}
    with pytest.raises(SpecError, match="offsets and offsets_s are both given"):
        units(offsets="random", offsets_s=[1.0])
    with pytest.raises(SpecError, match="offsets is 'any'"):
        units(offsets="any")


def test_a_seed_in_a_set_draws_another_sample_for_each_repetition(laboratory):
    found = units(traces=["logs,sample=1,seed={seed}"], repetitions=6)
    assert len(found) == 6
    assert len({unit.trace_sha256 for unit in found}) > 1


def test_files_are_looked_for_from_the_experiments_folder(laboratory, tmp_path):
    lines = 'contexts = ["docs"]\ntraces = ["logs/bw=9", "steady"]\ndeadlines_s = [1.0]\n'
    lines += 'links = ["up_trace=logs/bw=5/t_1"]\n[[schemes]]\npolicy = "text"\ncodec = "kvstream"\n'
    (tmp_path / "mine.toml").write_text(lines)
    here = experiment.load("mine.toml")
    assert here.traces == ("logs/bw=9", "steady")
    (tmp_path / "deep").mkdir()
    shutil.move("logs", "deep/logs")
    shutil.move("mine.toml", "deep/mine.toml")
    there = experiment.load("deep/mine.toml")
    assert there.traces == ("deep/logs/bw=9", "steady")
    assert there.links == ("up_trace=deep/logs/bw=5/t_1",)
    assert [unit.trace for unit in there.units()] == ["t_1", "t_2", "steady"]


def test_a_bad_file_is_named_and_skipped_only_where_told_to(laboratory, tmp_path):
    (tmp_path / "logs" / "README").write_text("Measured by us.\n")
    with pytest.raises(TraceError, match=r"1 of 4 files cannot be read .*README: "):
        units()
    made = experiment.from_dict(BASE | {"traces": ["logs,skip=on"]})
    assert len(made.units()) == 3
    assert list(made.opened.describe()["skipped"]) == ["README"]


def test_a_trace_keeps_the_name_it_was_given(laboratory):
    given = units(traces=["logs/bw=5/t_1,name=slow", "logs/bw=9/t_1,name=fast", "uniform,seed={seed}"])
    assert [unit.trace for unit in given] == ["slow", "fast", "uniform,seed=1"]
    twice = units(traces=["steady,scale=2,name=x", "steady,scale=3,name=x"])
    assert [unit.trace for unit in twice] == ["x#1", "x#2"]


def test_a_run_says_where_its_traces_come_from(laboratory, tmp_path, capsys):
    words = ["simulate", "--trace", "logs/bw=9,skip=on", "--policy", "text", "--context", "docs", "--name", "r"]
    (tmp_path / "logs" / "bw=9" / "notes.txt").write_text("hm\n")
    assert cli.main([*words, "--deadline", "1s"]) == 0
    said = capsys.readouterr().err
    assert "1 file of sets cannot be read, skipped: notes.txt" in said
    assert "sessions of 1 s see only the beginning of the 300 s of t_1 and of 1 other trace; --offset random" in said
    manifest = json.loads((tmp_path / "runs" / "r" / "manifest.json").read_text())
    [source] = manifest["provenance"]["t_2"]["sources"]
    assert (source["source"], source["format"], source["chosen"]) == ("t_2", "pensieve", "recognised")
    assert len(source["sha256"]) == 64
    assert manifest["skipped"]["notes.txt"].startswith("matches no trace format")
    report = (tmp_path / "runs" / "r" / "report.html").read_text()
    assert "Sources of the traces" in report
    assert source["sha256"][:12] in report
    assert "notes.txt" in report
    assert cli.main([*words, "--deadline", "1s", "--offset", "random", "--dry-run"]) == 0
    planned = capsys.readouterr()
    assert "over t_1 from " in planned.out
    assert "only the beginning" not in planned.err
