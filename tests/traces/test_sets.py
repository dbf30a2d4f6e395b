"""Folders, patterns and files of several traces."""

from __future__ import annotations

import pytest

from kvstream.traces.errors import TraceError
from kvstream.traces.resolve import open_trace
from kvstream.traces.sets import is_set, open_all, survey


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten cooked traces of 10 to 100 s with means of 1 to 10 Mbit/s, two of them in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "bw=5").mkdir(parents=True)
    for i in range(1, 11):
        place = tmp_path / "logs" / ("bw=5" if i > 8 else "")
        (place / f"t_{i:02d}").write_text("".join(f"{t}.0\t{i}.013\n" for t in range(10 * i + 1)))
    (tmp_path / "logs" / ".DS_Store").write_bytes(b"\0\1")
    return tmp_path / "logs"


def names(spec: str) -> list[str]:
    return [member.trace.name for member in open_all(spec).members]


def test_a_folder_has_the_files_in_it_and_below_in_the_order_of_names(folder):
    assert names("logs") == [f"t_{i:02d}" for i in range(1, 11)]
    assert names("logs/") == names(str(folder))
    assert names("logs/bw=5") == ["t_09", "t_10"]
    assert names("logs/t_0[1-3]") == ["t_01", "t_02", "t_03"]
    assert names("logs/**/t_1?") == ["t_10"]
    assert names(f"{folder}/bw=5/*9*") == ["t_09"]


def test_members_are_opened_again_by_their_specs(folder):
    for member in open_all("logs,scale=2,take=5s").members:
        assert open_trace(member.spec) == member.trace
        assert member.trace.name.endswith(",scale=2,take=5s")
        assert member.trace.provenance[0].sha256


def test_filters_and_samples(folder):
    found = [member.trace for member in open_all("logs,min_length=35s,max_length=60s").members]
    assert [trace.name for trace in found] == ["t_04", "t_05", "t_06"]
    assert [trace.duration_s for trace in found] == [40.0, 50.0, 60.0]
    found = [member.trace for member in open_all("logs,min_mean=3Mbps,max_mean=5Mbps").members]
    assert [round(trace.mean_bps / 1e6 * 1448 / 1514) for trace in found] == [3, 4]
    drawn = names("logs,sample=4,seed=3")
    assert len(set(drawn)) == 4
    assert drawn == sorted(drawn) == names(f"{folder},sample=4,seed=3"), "whatever the folder is called"
    assert len({tuple(names(f"logs,sample=4,seed={seed}")) for seed in range(8)}) > 1


def test_all_unreadable_files_are_named_at_once_and_skipped_where_told_to(folder):
    (folder / "README.md").write_text("# Traces\n\nMeasured by us.\n")
    (folder / "kbps").write_text("0 5000\n1 3000\n")
    (folder / "mbps").write_text("0 5000\n1 3000\n")
    with pytest.raises(TraceError) as caught:
        open_all("logs")
    said = str(caught.value)
    assert "\n" not in said
    assert "3 of 13 files cannot be read (skip=on goes on without them)" in said
    assert "kbps, mbps: rates in whole numbers" in said
    assert "README.md: matches no trace format" in said
    done = open_all("logs,skip=on")
    assert len(done.members) == 10
    assert set(done.skipped) == {"README.md", "kbps", "mbps"}
    assert set(survey("logs").skipped) == set(done.skipped)
    assert len(open_all("logs,skip=on,sample=10").members) == 10


def test_every_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bw.jsonl").write_text('{"bw": [1.0, 2.0]}\n{"bw": [3.0]}\n{"bw": [x]}\n')
    assert len(survey("bw.jsonl,part=all").skipped) == 1
    found = open_all("bw.jsonl,part=all,skip=on,hold=0.2s")
    assert [len(member.trace) for member in found.members] == [2, 1]
    assert [member.trace.name for member in found.members] == [f"bw.jsonl#000{i},part={i},hold=0.2s" for i in (0, 1)]
    (tmp_path / "one").write_text("0.0 1.5\n5.0 2.25\n")
    with pytest.raises(TraceError, match="holds one trace"):
        open_all("one,part=all")


def test_what_is_no_set_is_one_trace():
    assert not is_set("steady")
    assert [member.trace.name for member in open_all("uniform,seed=3").members] == ["uniform,seed=3"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("logs,sample=11", "sample=11, but 10 traces are left; ask for fewer"),
        ("logs,sample=0", "give 1 or more"),
        ("logs,sample=x", "give a whole number"),
        ("logs,min_length=3", "'3' has no unit; write 3s or 3ms"),
        ("logs,min_length=1h", "none of its 10 traces is as min_ and max_ ask"),
        ("logs,skip=yes", "skip=yes; use on or off"),
        ("logs,name=mine", "name= is for one trace"),
        ("logs,colour=red", "10 of 10 files cannot be read .*unknown setting 'colour'"),
        ("logs/nothing*", "no files there; give a folder that has some"),
        ("logs/t_01,sample=2", "sample is for sets of traces: a folder, or a pattern"),
        ("empty", "no files there"),
    ],
)
def test_bad_sets_are_refused_in_one_line(folder, spec, says):
    (folder.parent / "empty").mkdir()
    with pytest.raises(TraceError, match=says) as caught:
        open_all(spec)
    assert "\n" not in str(caught.value)


def test_a_set_is_refused_where_one_trace_is_asked_for(folder):
    with pytest.raises(TraceError, match="is a set of traces, and one is asked for here"):
        open_trace("logs")
    with pytest.raises(TraceError, match="is a set of traces"):
        open_trace("logs/t_*")


def test_a_set_of_which_nothing_can_be_read_is_refused_even_where_it_may_skip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "README").write_text("Measured by us.\n")
    with pytest.raises(TraceError, match="1 of 1 files cannot be read"):
        open_all("logs,skip=on")
