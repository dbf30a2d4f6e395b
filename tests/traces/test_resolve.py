"""Specs: the text that names a trace."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest

from kvstream.traces import formats, library, resolve
from kvstream.traces.errors import TraceError
from kvstream.traces.generators import constant, histogram, paper_uniform, step, uniform
from kvstream.traces.resolve import TRANSFORMS, open_trace


def test_a_generator_with_quantities():
    trace = open_trace("uniform,low=100Mbps,high=10Gbps,hold=0.2s,seed=7")
    assert trace == uniform(low=100e6, high=10e9, hold=0.2, seed=7)
    assert trace.name == "uniform,low=100Mbps,high=10Gbps,hold=0.2s,seed=7"
    assert open_trace("constant") == constant()
    assert open_trace("paper-uniform,per=time,seed=2") == paper_uniform(per="time", seed=2)


def test_lists_in_a_spec():
    assert open_trace("step,rates=2Gbps:200Mbps:1Gbps,hold=1s:2s:3s") == step(
        rates=(2e9, 0.2e9, 1e9), hold=(1.0, 2.0, 3.0)
    )
    spec = "histogram,edges=1Mbps:2Mbps:4Mbps,weights=1:3"
    assert open_trace(spec) == histogram(edges=(1e6, 2e6, 4e6), weights=(1.0, 3.0))


def test_library_names_and_members():
    assert open_trace("steady") == library.load("steady")
    assert open_trace("steady").name == "steady"
    assert open_trace("family/wave-003").name == "family/wave-003"
    assert open_trace("steady,scale_mean=20Mbps").mean_bps == pytest.approx(20e6)


def test_files(tmp_path):
    path = tmp_path / "bw.jsonl"
    path.write_text('{"bw": [1.0, 2.0]}\n{"bw": [3.0]}\n')
    goodput = 1448 / 1514
    assert open_trace(f"{path},part=1").chunk_rate(0) == pytest.approx(3e9 / goodput)
    assert open_trace(f"{path},part=0").name == "bw.jsonl,part=0"
    laid = open_trace(f"{path},part=0,hold=0.5s")
    assert laid.bits_by(1.0) == pytest.approx(1.5e9 / goodput)
    rows = tmp_path / "log.txt"
    rows.write_text("0 10\n1 20\n2 30\n")
    with pytest.raises(TraceError, match="rates in whole numbers"):
        open_trace(str(rows))
    assert open_trace(f"{rows},format=lumos5g") == formats.load(rows, "lumos5g")
    comma = tmp_path / "a,b.csv"
    comma.write_text("duration_s,rate_bps\n1,5\n")
    assert open_trace(str(comma)) == open_trace(comma) == formats.load(comma)


def test_transforms_apply_in_the_order_written_and_are_recorded():
    first = open_trace("step-down-up,scale_mean=10Mbps,clip_high=12Mbps")
    second = open_trace("step-down-up,clip_high=12Mbps,scale_mean=10Mbps")
    assert first != second
    assert first.peak_bps == 12e6
    assert [word.split()[0] for word in first.provenance[0].transforms] == ["end", "scaled", "clipped"]


@pytest.mark.parametrize(
    ("setting", "by_hand"),
    {
        "start=0.4s": lambda t: t.shifted(0.4),
        "take=1s": lambda t: t.sliced(0.0, 1.0),
        "scale=0.5": lambda t: t.scaled(0.5),
        "scale_mean=9Mbps": lambda t: t.scale_to(mean_bps=9e6),
        "scale_peak=9Mbps": lambda t: t.scale_to(peak_bps=9e6),
        "clip_low=15Mbps": lambda t: t.clipped(low_bps=15e6),
        "clip_high=15Mbps": lambda t: t.clipped(high_bps=15e6),
        "stretch=2": lambda t: t.stretched(2.0),
        "resample=50ms": lambda t: t.resampled(0.05),
        "end=hold": lambda t: t.with_end("hold"),
        "then=lab-cliff": lambda t: t.concatenated(library.load("lab-cliff")),
        "name=mine": lambda t: t.renamed("mine"),
    }.items(),
)
def test_every_transform(setting, by_hand):
    made, wanted = open_trace(f"step-down-up,{setting}"), by_hand(library.load("step-down-up"))
    assert made == wanted
    assert made.provenance == wanted.provenance
    assert setting.partition("=")[0] in TRANSFORMS
    assert made.name == ("mine" if setting == "name=mine" else f"step-down-up,{setting}")


def test_a_trace_after_another_stands_in_the_provenance(tmp_path):
    path = tmp_path / "second.csv"
    path.write_text("duration_s,rate_bps\n1,5e6\n2,7e6\n")
    both = open_trace(f"constant,rate=3Mbps,length=2s,then={path},scale=2")
    assert both.rates_bps.tolist() == [6e6, 10e6, 14e6]
    assert both.name == "constant,rate=3Mbps,length=2s,then=second.csv,scale=2"
    assert [record.source for record in both.provenance] == ["constant,rate=3000000bps,length=2s", "second.csv"]
    assert both.provenance[1].sha256
    assert [record.transforms[0].partition(" of 2")[0] for record in both.provenance] == ["part 1", "part 2"]


def test_a_histogram_of_another_trace_is_drawn_from(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("duration_s,rate_bps\n3,2e6\n1,8e6\n")
    drawn = open_trace(f"histogram,of={path},bins=2,length=400s,seed=3,scale=2")
    assert np.mean(drawn.rates_bps < 10e6) == pytest.approx(0.75, abs=0.04)
    assert 4e6 <= drawn.rates_bps.min() <= drawn.peak_bps <= 16e6
    assert drawn.name == "histogram,of=log.csv,bins=2,length=400s,seed=3,scale=2"
    made, source = drawn.provenance
    assert open_trace(f"{made.source},scale=2") == drawn, "the record alone makes it again"
    assert (source.source, source.sha256) == ("log.csv", formats.load(path).provenance[0].sha256)
    assert f"histogram of 2 bins (trace sha256 {formats.load(path).sha256})" in source.transforms[0]
    (tmp_path / "log.json").write_text('[{"duration_ms": 1000, "bandwidth_kbps": 5000}]')
    assert open_trace(f"histogram,of={tmp_path / 'log.json'}").kind == "achieved"
    assert open_trace("histogram,of=lte-walk") == open_trace("histogram,of=lte-walk,bins=20")


def test_a_generators_own_setting_comes_before_the_transform():
    assert open_trace("uniform,hold=0.5s") == uniform(hold=0.5)
    assert open_trace("uniform,per=chunk,end=hold").end == "hold"


def test_plug_ins(monkeypatch):
    point = EntryPoint("my-link", "kvstream.traces.generators:constant", "kvstream.traces")
    wrong = EntryPoint("not-a-link", "builtins:dict", "kvstream.traces")

    def points(*, group: str, name: str) -> EntryPoints:
        return EntryPoints([point, wrong]).select(group=group, name=name)

    monkeypatch.setattr(resolve, "entry_points", points)
    assert open_trace("my-link,rate=5Mbps,end=hold").rates_bps.tolist() == [5e6]
    with pytest.raises(TraceError, match="returned a dict"):
        open_trace("not-a-link")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "begin with a name"),
        ("low=3", "begin with a name"),
        ("unifrom", "did you mean uniform"),
        ("stedy", "did you mean steady"),
        ("zzz", "trace list"),
        ("./nothing.csv", "no such file"),
        ("uniform,low", "'low' is not key=value"),
        ("uniform,low=", "'low=' is not key=value"),
        ("uniform,low=1,low=2", "given twice"),
        ("uniform,lo=1", "unknown setting 'lo'; did you mean low"),
        ("uniform,low=3s", "low: '3s' is a time; expected a rate"),
        ("uniform,hold=3Mbps", "hold: '3Mbps' is a rate; expected a time"),
        ("uniform,seed=1.5", "seed: '1.5' is not a whole number"),
        ("uniform,seed=-1", "seed=-1"),
        ("uniform,per=packet", "per: 'packet'; choose from time, chunk"),
        ("uniform,low=9Mbps,high=1Mbps", "low must not exceed high"),
        ("square,duty=200%", "more than 100%"),
        ("step,rates=1Mbps:x", "'x' is not a quantity"),
        ("steady,low=1Mbps", "unknown setting 'low'; choose from start"),
        ("steady,scale=fast", "scale: 'fast' is not a quantity"),
        ("steady,scale=0", "scale: .* scale factor"),
        ("steady,end=bounce", "end: .* choose from loop, hold, stop"),
        ("steady,hold=1s", "hold: .* already over time"),
        ("paper-uniform,resample=1s", "per=time"),
        ("lab-cliff,end=stop,start=99s", "no start offset"),
        ("uniform,length=1e12s", "more than"),
        ("paper-uniform,hold=0.2s", "hold is for per=time: write per=time,hold=0.2s"),
        ("uniform,per=chunk,length=3s", "length is for per=time: write per=time,length=3s"),
        ("uniform,chunks=7", "chunks is for per=chunk: write per=chunk,chunks=7"),
        ("steady,then=stedy", "then: unknown trace 'stedy'.* did you mean steady"),
        ("steady,then=paper-uniform", "then: .* per=time"),
        ("histogram,bins=5", "bins needs of="),
        ("histogram,of=steady,edges=1Mbps:2Mbps", "of=steady already defines edges"),
        ("histogram,of=steady,bins=0", "bins=0; give 1 to 10000"),
        ("histogram,of=steady,bins=1e9", "bins=1000000000; give 1 to 10000"),
        ("histogram,of=steady,bins=x", "'x' is not a quantity"),
        ("histogram,of=stedy", "did you mean steady"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec, says):
    with pytest.raises(TraceError, match=says) as caught:
        open_trace(spec)
    assert "\n" not in str(caught.value)


def test_a_bad_part_is_refused(tmp_path):
    path = tmp_path / "bw.jsonl"
    path.write_text('{"bw": [1.0]}\n')
    for part in ("x", "-1", "9"):
        with pytest.raises(TraceError, match="part"):
            open_trace(f"{path},part={part}")
