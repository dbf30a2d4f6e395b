"""Names with settings: quoting, and files with any name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.traces import grammar
from kvstream.traces.errors import TraceError
from kvstream.traces.resolve import based, open_trace


def none(name: str) -> bool:
    return False


words = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=20)
keys = st.text(st.characters(categories=["L"]), min_size=1, max_size=8)


@given(words, st.dictionaries(keys, words, max_size=4))
def test_what_is_written_is_read_back(name, settings):
    assert grammar.parse(grammar.write(name, settings), none) == (name, settings)


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("mpc,horizon=5", "mpc", {"horizon": "5"}),
        ('"a,b.log",start=2s', "a,b.log", {"start": "2s"}),
        ("'a,b.log' , start = 2s ", "a,b.log", {"start": "2s"}),
        ('"say ""hi"", twice"', 'say "hi", twice', {}),
        ('steady,then="x,format=pensieve",scale=2', "steady", {"then": "x,format=pensieve", "scale": "2"}),
        ("steady,then=x=_0", "steady", {"then": "x=_0"}),
        ("steady,,scale=2,", "steady", {"scale": "2"}),
        ("it's,scale=2", "it's", {"scale": "2"}),
    ],
)
def test_quotes_are_for_commas(text, name, settings):
    assert grammar.parse(text, none) == (name, settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"a"b', "after the quoted name comes 'b'; expected a comma"),
        ('a,then="x"y', "after 'then=x' comes 'y'; expected a comma"),
        ('a,b\nc="x"y', r"after 'b\\nc=x' comes 'y'; expected a comma"),
        ('a,"x"', "is not key=value"),
        ('a,="x"', "has no name"),
        ('a,b,c="x"', "'b' is not key=value"),
        ('a,b=1,b="2"', "'b' is given twice"),
        ('a,b="2', None),
    ],
)
def test_unfinished_quotes_are_refused(text, says):
    if says is None:
        assert grammar.parse(text, none) == ("a", {"b": '"2'})
        return
    with pytest.raises(TraceError, match=says):
        grammar.parse(text, none)


NAMES = ["x=_0", "x=,_0", "a,b.log", "two words.log", "ö=ü,名前", "bw=5/trace,1", "a,scale=2", '"', "~", "sub/it's"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_needs_no_quotes_where_it_exists(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("0.0 1.5\n5.0 2.25\n")
    plain = open_trace(name)
    assert plain.provenance[0].source == file.name
    assert open_trace(f"{name},scale=2").mean_bps == pytest.approx(2 * plain.mean_bps)
    assert open_trace(grammar.write(name, {"scale": "2"})).mean_bps == pytest.approx(2 * plain.mean_bps)
    assert open_trace(grammar.write("steady", {"take": "5s", "then": name})).duration_s == pytest.approx(10.0)
    assert open_trace(f"{file},start=1s").name == f"{file.name},start=1s"


def test_the_longest_name_that_exists_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, mbps in (("a", "1.25"), ("a,scale=2", "4.75")):
        (tmp_path / name).write_text(f"0.0 {mbps}\n5.0 {mbps}1\n")
    assert open_trace("a,scale=2").mean_bps > 4e6
    assert open_trace('"a",scale=2').mean_bps == pytest.approx(2 * open_trace("a").mean_bps)


def test_a_file_that_does_not_exist_is_said_to_be_missing():
    with pytest.raises(TraceError, match="no such file or library trace"):
        open_trace("bw=5/trace_1")
    with pytest.raises(TraceError, match="begin with a name"):
        open_trace("bw=5")


def test_files_are_looked_for_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a,b.log").write_text("0.0 1.5\n5.0 2.25\n")
    spec = based("a,b.log,scale=2", tmp_path / "logs")
    assert open_trace(spec).duration_s == 5.0
    assert based("steady,then=a.log", tmp_path) == f"steady,then={tmp_path / 'a.log'}"
    assert based("uniform,low=1Mbps", tmp_path) == "uniform,low=1Mbps"
    assert based("family/wave-003", tmp_path) == "family/wave-003"
    assert based(str(tmp_path / "x"), tmp_path / "y") == str(tmp_path / "x")
