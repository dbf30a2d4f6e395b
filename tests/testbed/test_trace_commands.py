"""`kvstream trace`: what is listed, shown and converted."""

from __future__ import annotations

import json

import pytest

from testbed import cli
from traces import formats
from traces.formats import FORMATS


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
    assert said == f"kvstream: format csv cannot say that rates are achieved; {out} will be read as capacity\n"
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
