"""`kvstream trace`: what is listed, shown and converted."""

from __future__ import annotations

import json

import pytest

from kvstream.testbed import cli
from kvstream.traces import formats
from kvstream.traces.formats import FORMATS


def printed(capsys, *words: str) -> str:
    assert cli.main(["trace", *words]) == 0
    return capsys.readouterr().out


def test_the_list_says_what_each_format_means(capsys):
    text = printed(capsys, "list")
    for name, format in FORMATS.items():
        [line] = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert format.unit in line
        assert format.edge in line
    about = json.loads(printed(capsys, "list", "--json"))["formats"]
    assert set(about) == set(FORMATS)
    assert about["oboe"] == {
        "unit": FORMATS["oboe"].unit,
        "edge": FORMATS["oboe"].edge,
        "kind": "achieved",
        "written": False,
    }


def test_show_prints_every_column_and_the_story(tmp_path, capsys):
    rows = tmp_path / "t.csv"
    rows.write_text("duration_s,rate_bps,delay_ms,loss\n1,5000000,20,0.01\n")
    shown = json.loads(printed(capsys, "show", str(rows), "--json"))
    assert (shown["rates_bps"], shown["delay_s"], shown["loss"]) == ([5e6], [0.02], [0.01])
    assert shown["story"] == ""
    lesson = json.loads(printed(capsys, "show", "lab-cliff", "--json"))
    assert lesson["story"].startswith("Lesson 2.")
    assert lesson["delay_s"] is None


def test_converting_says_what_the_written_format_cannot(tmp_path, capsys):
    log, out = tmp_path / "log.json", tmp_path / "out.csv"
    log.write_text('[{"duration_ms": 1000, "bandwidth_kbps": 5000, "latency_ms": 40}]')
    assert cli.main(["trace", "convert", str(log), str(out), "--to", "csv"]) == 0
    said = capsys.readouterr().err
    assert said == f"kvstream: format csv cannot record that rates are achieved; {out} will be read as capacity\n"
    assert json.loads(printed(capsys, "show", str(out), "--json"))["delay_s"] == [0.02]
    for to in ("kvstream", "sabre"):
        assert cli.main(["trace", "convert", str(log), str(out), "--to", to]) == 0
        assert capsys.readouterr().err == ""


def test_a_format_goes_with_part_and_transforms(tmp_path, capsys):
    log, comma, out = tmp_path / "log.txt", tmp_path / "a,b.txt", tmp_path / "out.csv"
    for file in (log, comma):
        file.write_text("0 10\n1 20\n2 30\n")
    for spec, mean_bps in ((f"{log},scale_mean=9Mbps", 9e6), (f"{log},take=1s,scale_mean=4Mbps", 4e6)):
        printed(capsys, "convert", spec, str(out), "--from", "lumos5g")
        assert formats.load(out).mean_bps == pytest.approx(mean_bps)
    printed(capsys, "convert", str(comma), str(out), "--from", "lumos5g")
    assert formats.load(out) == formats.load(log, "lumos5g")
    log.write_text('{"bw": [1.0]}\n{"bw": [2.0]}\n')
    printed(capsys, "convert", f"{log},part=1", str(out), "--from", "cachegen")
    assert formats.load(out).chunk_rate(0) == pytest.approx(2e9 * 1514 / 1448)
    assert cli.main(["trace", "convert", "steady", str(out), "--from", "csv"]) == 2
    assert "--from is for files" in capsys.readouterr().err


def test_converting_never_overwrites_its_input(tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text("0.0 1.5\n5.0 2.25\n")
    (tmp_path / "link").symlink_to(log)
    for output in (log, tmp_path / "link"):
        assert cli.main(["trace", "convert", f"{log},scale=2", str(output)]) == 2
        assert "is the input itself; choose another name" in capsys.readouterr().err
    assert log.read_text() == "0.0 1.5\n5.0 2.25\n"


def test_converting_says_when_the_format_must_be_named_to_read_it_back(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["trace", "convert", "constant,rate=9Gbps,length=2s,take=1s", str(out), "--to", "pensieve"]) == 0
    assert f"name its format when you read it: {out},format=pensieve" in capsys.readouterr().err
    assert formats.load(out, "pensieve").mean_bps == pytest.approx(9e9)


def test_a_folder_is_shown_file_by_file(tmp_path, capsys):
    (tmp_path / "bw=5").mkdir()
    (tmp_path / "bw=5" / "t_1").write_text("0.0 1.5\n5.0 2.25\n")
    (tmp_path / "bw.jsonl").write_text('{"bw": [1.0, 2.0]}\n')
    (tmp_path / "kbps.log").write_text("0 5000\n1 3000\n")
    lines = printed(capsys, "show", str(tmp_path)).splitlines()
    assert lines[0].split() == ["bw.jsonl", "cachegen", "per", "chunk,", "mean", "1.57", "Gbit/s"]
    assert lines[1].split()[:3] == ["t_1", "pensieve", "5"]
    assert lines[2].startswith("kbps.log")
    assert "unreadable: rates in whole numbers" in lines[2]
    assert lines[3] == "2 traces, 1 file that cannot be read"
    found = json.loads(printed(capsys, "show", str(tmp_path), "--json"))
    assert [one["name"] for one in found["traces"]] == ["bw.jsonl", "t_1"]
    assert list(found["unreadable"]) == ["kbps.log"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["simulate", "--deadline", "800"], "'800' has no unit; write 800s or 800ms"),
        (["simulate", "--link", "queue=10"], "link: queue: '10' has no unit; write 10s or 10ms"),
        (["simulate", "--link", "delay=20"], "link: delay: '20' has no unit; write 20s or 20ms"),
        (["trace", "show", "steady,scale_mean=30"], "scale_mean: '30' has no unit; write 30Mbps, 30kbps or 30bps"),
        (["trace", "show", "uniform,low=5"], "low: '5' has no unit"),
        (["trace", "replay", "steady", "--both", "iperf3 -s"], "--both needs a command"),
        (["trace", "replay", "steady", "--measure", "--", "true"], "--measure fills the link by itself"),
    ],
)
def test_numbers_without_a_unit_and_options_without_a_use_are_refused(words, says, capsys, monkeypatch):
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err
