"""Trace files: golden lines of every format, round trips, recognition, and hostile input."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstream.traces import formats
from kvstream.traces.errors import TraceError
from kvstream.traces.formats import FORMATS
from kvstream.traces.formats.base import GOODPUT_NOTE
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.generators import constant, paper_uniform, step, uniform
from kvstream.traces.trace import Provenance, Trace

DATA = Path(__file__).parent / "data"
UP = 1.0 / goodput_per_capacity()  # goodput to capacity

# file, format, part, durations (s), rates as application or link bit/s, whether they are goodput, end
GOLDEN = [
    ("mahimahi.up", "mahimahi", None, [0.05, 0.01], [4 * 12112 / 0.05, 3 * 12112 / 0.01], False, "loop"),
    ("pensieve.txt", "pensieve", None, [1.10000014305 - 0.549999952316, 0.89999985695], [5.5e6, 0.25e6], True, "loop"),
    ("fcc.csv", "fcc", 0, [5.0, 5.0], [2e6, 1e6], True, "loop"),
    ("fcc.csv", "fcc", 1, [5.0], [4e6], True, "loop"),
    ("norway.log", "norway-hsdpa", None, [1.008, 1.0, 1.0], [248069 * 8 / 1.008, 1e6, 0.0], True, "loop"),
    ("ghent.log", "ghent-4g", None, [1.0, 1.0], [19944800.0, 1e7], True, "loop"),
    ("sabre.json", "sabre", None, [30.0, 1.5], [5e6, 1e6], True, "loop"),
    ("ucc.csv", "ucc-5g", None, [1.0, 3.0, 1.0], [72e3, 2e6, 500e3], True, "loop"),
    ("lumos4g.txt", "lumos5g", None, [1.0, 1.0, 1.0], [45e6, 46.5e6, 0.0], True, "loop"),
    ("lumos5g.txt", "lumos5g", None, [1.0, 1.0], [91e6, 920.5e6], True, "loop"),
    ("puffer.csv", "puffer", 0, [2.0, 2.0], [1e7, 5e6], True, "loop"),
    ("puffer.csv", "puffer", 1, [1.0], [2e7], True, "loop"),
    ("oboe.txt", "oboe", None, [0.459, 0.04, 0.391], [3168640.0, 3175930.0, 3183220.0], True, "loop"),
    ("purdue.txt", "purdue", None, [10.0, 10.0], [1e6, 5e6], False, "hold"),
    ("genet.json", "genet", None, [0.1, 0.4, 0.4], [9.07081e6, 9.5e6, 0.0], False, "loop"),
    ("iperf3.json", "iperf3", None, [1.000685, 0.5], [505.5e6, 1e6], True, "loop"),
    ("dashjs.js", "dashjs", 0, [30.0, 0.25], [1.2e6, 0.8e6], True, "loop"),
    ("dashjs.js", "dashjs", 1, [10.0], [5e5], True, "loop"),
    ("cachegen.jsonl", "cachegen", 0, [], [0.5658e9, 5.0257e9, 9.5e9], True, "loop"),
    ("cachegen.jsonl", "cachegen", 1, [], [1.5e9], True, "loop"),
    ("plain.csv", "csv", None, [0.5, 0.5], [10e6, 2.5e6], False, "loop"),
    ("kvstream.csv", "kvstream", None, [0.5, 0.25], [1e6, 2e6], False, "stop"),
]


@pytest.mark.parametrize(("file", "format", "part", "durations", "rates", "goodput", "end"), GOLDEN)
def test_golden_lines(file, format, part, durations, rates, goodput, end):
    trace = formats.load(DATA / file, format, part)
    assert trace.durations_s == pytest.approx(durations)
    assert trace.rates_bps == pytest.approx(np.array(rates) * (UP if goodput else 1.0))
    assert trace.end == end
    assert trace.per == ("chunk" if format == "cachegen" else "time")
    assert FORMATS[format].kind in (None, trace.kind)


FOREIGN = [(file, format, part, goodput) for file, format, part, _, _, goodput, _ in GOLDEN if format != "kvstream"]


@pytest.mark.parametrize(("file", "format", "part", "goodput"), FOREIGN)
def test_the_provenance_of_a_foreign_file(file, format, part, goodput):
    (record,) = formats.load(DATA / file, format, part).provenance
    assert record.source == file
    assert record.format == format
    assert record.sha256 == hashlib.sha256((DATA / file).read_bytes()).hexdigest()
    assert (GOODPUT_NOTE in record.transforms) == goodput


def test_columns_of_delay_and_loss():
    assert formats.load(DATA / "sabre.json").delay_s == pytest.approx([0.0375, 0.0125])
    plain = formats.load(DATA / "plain.csv")
    assert plain.delay_s == pytest.approx([0.02, 0.04])
    assert plain.loss == pytest.approx([0.0, 0.01])
    ours = formats.load(DATA / "kvstream.csv")
    assert ours.loss == pytest.approx([0.0, 0.1])
    assert (ours.name, ours.story) == ("sample", "Two rows.")
    assert ours.provenance == (Provenance("by hand", "kvstream", "Apache-2.0", ("none",)),)


def test_notes_say_what_a_loader_did():
    notes = formats.load(DATA / "ucc.csv").provenance[0].transforms
    assert "1 rows without a bitrate skipped" in notes
    assert "1 rows averaged with others of their second" in notes
    assert "unit 872 to http://example.org" in formats.load(DATA / "fcc.csv", part=0).provenance[0].transforms


def test_pensieve_and_lumos_read_the_same_rows_as_different_links():
    rows = b"0 10\n1 20\n2 30\n"
    ending = formats.loads(rows, "t", "pensieve")
    starting = formats.loads(rows, "t", "lumos5g")
    assert ending.rates_bps / UP == pytest.approx([20e6, 30e6])
    assert starting.rates_bps / UP == pytest.approx([10e6, 20e6, 30e6])


def test_oboe_gaps_are_linear():
    trace = formats.loads(b"0 1000\n1000 1000\n2000 3000\n3000 3000\n", "t", "oboe")
    assert len(trace) == 12
    assert trace.bits_by(1.5) / UP == pytest.approx(1e6 + 0.5 * (1e6 + 2e6) / 2)


# ---- recognising


NAMED = ("purdue", "rates")
"""Formats that no file says it has: they are never recognised."""
UNIQUE = {file: format for file, format, *_ in GOLDEN if format not in NAMED}


@pytest.mark.parametrize(("file", "format"), UNIQUE.items())
def test_a_file_that_fits_one_format_is_recognised(file, format):
    assert formats.sniff(DATA / file) == format


WHOLE = "rates in whole numbers could be bit/s, kbit/s or Mbit/s: .*unit=.*format="
PAIRS = {
    b"0 5\n1 5\n2 6\n3 6\n": WHOLE,
    b"0 1000000\n10 1000000\n": WHOLE,
    b"0\t25000\n5\t30000\n": WHOLE,
    b"1546300800.5 3\n1546300801.5 4\n": WHOLE,
    b"0.0 1.5\n1.0 1.5\n": "pensieve",
    b"0.5 3.0\n100.5 3.0\n": "one rate in pairs of rows .*format=",
    b"0 45.0\n1 46.5\n2 0.0\n": "lumos5g",
    b"0 45.0\n1 46.5\n1 40.0\n2 0.0\n4 11.5\n5 1.0\n": "lumos5g",
    b"1.0\t491.0\n2.0\t382.0\n3.0\t46.5\n": "lumos5g",
    b"0.0\t491.0\n1.0\t382.0\n2.0\t46.5\n": "pensieve",
    b"0.0\t0.984\n1.0\t0.984\n2.0\t0.972\n3.0\t1.056\n": "pensieve",
    b"0.0\t1.41832\n5.0\t1.39856\n": "pensieve",
    b"80.1700000763\t0.846376383764\n81.9900000095\t0.80423474724\n": "pensieve",
    b"15.0 3168.64\n474.0 3168.64\n514.0 3183.22\n905.0 3183.22\n": "oboe",
    b"129.0 354.3\n4234.0 354.3\n4439.0 550.7\n6699.0 550.7\n": "oboe",
    b"0 354.3\n4234 354.3\n4439 550.7\n": "pensieve",
    b"0.0 25000.5\n5.0 30000.5\n": "hardly Mbit/s.*unit=",
    b"0.0 1.5\n0.0 1.6\n5.0 2.5\n": "times do not rise .*repair=",
    b"0.5 1.5\n": "one pair of numbers",
}


@pytest.mark.parametrize(("rows", "verdict"), PAIRS.items())
def test_two_columns_are_recognised_by_rules_for_whole_files(rows, verdict):
    if verdict in FORMATS:
        trace = formats.loads(rows, "log.txt")
        assert (trace.provenance[0].format, trace.provenance[0].chosen) == (verdict, "recognised")
        assert formats.loads(rows, "log.txt", verdict).provenance[0].chosen == "named"
    else:
        with pytest.raises(TraceError, match=verdict):
            formats.loads(rows, "log.txt")


def test_rules_for_whole_files_look_at_all_of_it():
    """The first thousand rows could be Lumos5G's; one far down has another grain."""
    rows = "".join(f"{i} {40 + i % 7}.5\n" for i in range(1000))
    assert formats.loads(rows.encode(), "t").provenance[0].format == "lumos5g"
    assert formats.loads((rows + "1000 41.313\n").encode(), "t").provenance[0].format == "pensieve"


def test_a_file_that_fits_none_is_refused_naming_all():
    with pytest.raises(TraceError, match=r"matches no trace format") as caught:
        formats.loads(b"hello world\n", "log.txt")
    assert all(name in str(caught.value) for name in FORMATS)


def test_parts_must_be_named():
    with pytest.raises(TraceError, match=r"holds 2 traces .*part=0\.\.1"):
        formats.load(DATA / "cachegen.jsonl")
    with pytest.raises(TraceError, match=r"part=2 does not exist"):
        formats.load(DATA / "fcc.csv", part=2)
    with pytest.raises(TraceError, match="holds one trace"):
        formats.load(DATA / "plain.csv", part=0)


# ---- writing


def rows(low=1e3, smallest=0.001):
    return st.lists(
        st.tuples(st.floats(smallest, 10.0), st.one_of(st.just(0.0), st.floats(low, 1e10))), min_size=1, max_size=20
    )


labels = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)


@given(rows(), st.sampled_from(["loop", "hold", "stop"]), st.booleans(), labels, st.lists(labels, max_size=3))
def test_our_format_reads_back_bit_for_bit(content, end, columns, name, transforms):
    trace = Trace(
        name,
        [duration for duration, _ in content],
        [rate for _, rate in content],
        end=end,
        kind="achieved" if columns else "capacity",
        provenance=(Provenance(name, "csv", "MIT", tuple(transforms), "00"), Provenance("b", "c")),
        delay_s=[0.001 * i for i in range(len(content))] if columns else None,
        loss=[0.1 for _ in content] if columns else None,
        story=f"About {name}.",
    )
    back = formats.loads(formats.dumps(trace).encode(), "file.csv")
    assert back == trace
    assert (back.name, back.story, back.provenance) == (trace.name, trace.story, trace.provenance)


@given(st.lists(st.floats(0.0, 1e11), min_size=1, max_size=20), st.sampled_from(["loop", "hold", "stop"]))
def test_our_format_holds_per_chunk_traces(rates, end):
    trace = Trace("c", [], rates, end=end, per="chunk")
    assert formats.loads(formats.dumps(trace).encode(), "c.csv") == trace


@given(rows())
@settings(max_examples=50)
def test_other_formats_keep_times_and_rates(content):
    trace = Trace("t", [duration for duration, _ in content], [rate for _, rate in content])
    for name in ("csv", "pensieve", "sabre"):
        back = formats.loads(formats.dumps(trace, name).encode(), "t", name)
        assert back.durations_s == pytest.approx(trace.durations_s, rel=1e-6)
        assert back.rates_bps == pytest.approx(trace.rates_bps, rel=1e-9)


@given(rows(low=1e4, smallest=0.05), st.floats(0.0, 1.0))
@settings(max_examples=50)
def test_mahimahi_keeps_the_bits_to_a_packet(content, share):
    trace = Trace("t", [duration for duration, _ in content], [min(rate, 5e6) for _, rate in content])
    assume(trace.bits_by(trace.duration_s * 0.999999) >= 2 * 12112)
    back = formats.loads(formats.dumps(trace, "mahimahi").encode(), "t", "mahimahi")
    times = round(back.duration_s / trace.duration_s)
    assert back.duration_s == pytest.approx(times * trace.duration_s, abs=0.0006)
    assert back.mean_bps == pytest.approx(trace.mean_bps, rel=0.00101)
    whole = round(trace.mean_bps * times * trace.duration_s / 12112) * 12112
    assert back.mean_bps * back.duration_s == pytest.approx(whole)
    bins = math.floor(share * (min(times * trace.duration_s, back.duration_s) - 0.001) / 0.05)
    # half a packet of total error, one of position, 1 ms of the clock, and the last packet, which marks the period
    slack = 3.5 * 12112 + 0.0021 * trace.peak_bps
    assert abs(back.bits_by(bins * 0.05) - trace.bits_by(bins * 0.05)) <= slack


@pytest.mark.parametrize(
    "columns", [{}, {"delay_s": [0.1, 1e-9]}, {"loss": [0.0, 0.3]}, {"delay_s": [0, 1], "loss": [1, 0]}]
)
def test_csv_holds_every_column(columns):
    trace = Trace("t", [0.1, 1 / 3], [5e6, 1e6 / 7], **columns)
    assert formats.loads(formats.dumps(trace, "csv").encode(), "t.csv", "csv") == trace


def test_mahimahi_both_ways():
    text = formats.dumps(constant(rate=12.112e6, length=1.0), "mahimahi")
    assert text.splitlines() == [str(ms) for ms in range(1, 1001)]
    back = formats.loads(text.encode(), "t.down")
    assert back.rates_bps == pytest.approx(np.full(20, 12.112e6))


def test_mahimahi_repeats_what_is_too_short_for_whole_milliseconds():
    """12.6 ms would be 13, and the mean 3 % off; five times as long is 63."""
    back = formats.loads(formats.dumps(constant(rate=30e6, length=0.0126), "mahimahi").encode(), "t.down")
    assert back.duration_s == pytest.approx(0.063)
    assert back.mean_bps == pytest.approx(30e6, rel=0.001)


def test_cachegen_both_ways():
    trace = paper_uniform(seed=1, chunks=7)
    text = formats.dumps(trace, "cachegen")
    assert json.loads(text)["bw"] == pytest.approx(trace.rates_bps * 1448 / 1514 / 1e9)
    back = formats.loads(text.encode(), "bw.jsonl")
    assert back.rates_bps == pytest.approx(trace.rates_bps)
    assert back.per == "chunk"


@pytest.mark.parametrize(
    ("trace", "format", "says"),
    [
        (step(), "mahimahi", "cannot express end=hold"),
        (step(), "csv", "cannot express end=hold"),
        (paper_uniform(), "csv", "one rate per chunk"),
        (uniform(), "cachegen", "is over time"),
        (paper_uniform().with_end("stop"), "cachegen", "cannot express end=stop"),
        (Trace("t", [1.0], [1.0], delay_s=[0.1]), "pensieve", "no column for delay_s"),
        (Trace("t", [1.0], [1.0], loss=[0.1]), "sabre", "no column for loss"),
        (Trace("t", [1.0], [0.0]), "mahimahi", "carries no packet"),
        (Trace("t", [1.0], [0.001]), "mahimahi", "too slow or too short .* write format kvstream"),
        (constant(rate=10e9, length=60.0), "mahimahi", "lines in mahimahi"),
        (uniform(), "oboe", "can be read but not written"),
        (uniform(), "word", "unknown trace format 'word'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(trace, format, says):
    with pytest.raises(TraceError, match=says):
        formats.dumps(trace, format)


def test_files_are_saved_and_their_failures_said(tmp_path):
    formats.save(uniform(seed=3), tmp_path / "t.csv")
    assert formats.load(tmp_path / "t.csv") == uniform(seed=3)
    with pytest.raises(TraceError, match="cannot write"):
        formats.save(uniform(), tmp_path / "no" / "t.csv")
    with pytest.raises(TraceError, match="cannot read"):
        formats.load(tmp_path / "missing.csv")
    with pytest.raises(TraceError, match="cannot read"):
        formats.load(tmp_path)


def test_an_edited_file_of_ours_is_noticed():
    text = formats.dumps(step())
    with pytest.raises(TraceError, match="sha256"):
        formats.loads(text.replace("40000000.0", "41000000.0").encode(), "t.csv")
    edited = "\n".join(line for line in text.splitlines() if "sha256:" not in line).replace("40000000.0", "41000000.0")
    assert formats.loads(edited.encode(), "t.csv").peak_bps == 41e6


# ---- hostile input


HUGE = b"9" * 400
BAD_LINES = {
    "mahimahi": [
        b"5\n3\n",
        b"-1\n2\n",
        b"1.5\n2\n",
        b"0\n0\n",
        b"nan\n",
        b"1 2\n",
        b"99999999999999\n",
        HUGE,
        b"1\nx\n",
    ],
    "pensieve": [
        b"0 1\n",
        b"0 1\n0 2\n",
        b"1 1\n0 2\n",
        b"0 1\n1 -2\n",
        b"0 1\n1 nan\n",
        b"0 1\n1 2 3\n",
        b"0 1\n1 1e300\n",
    ],
    "lumos5g": [b"1 1\n0 2\n1 3\n2 4\n", b"0 1\n5 2\n", b"0 -1\n1 2\n", b"0\n", b"x 1\n"],
    "rates": [b"1\n", b"1 2\n3 4\n"],
    "genet": [
        b"[]",
        b"{",
        b'{"timestamps": [0], "bandwidths": []}',
        b'{"timestamps": [], "bandwidths": []}',
        b'{"timestamps": 1, "bandwidths": [1]}',
        b'{"timestamps": [0, 1], "bandwidths": [1, -1]}',
        b'{"timestamps": [0, 1], "bandwidths": [1, NaN]}',
        b'{"timestamps": [0, 1], "bandwidths": [1, "x"]}',
        b'{"timestamps": [1, 1], "bandwidths": [1, 1]}',
        b'{"timestamps": [0, 1, 2], "bandwidths": [1, 1, 1], "delays": [25, 25]}',
        b'{"timestamps": [0, 1], "bandwidths": [1, 1], "loss": 1.5}',
    ],
    "iperf3": [
        b"[]",
        b'{"start": {}}',
        b'{"start": {}, "intervals": [], "error": "unable to connect"}',
        b'{"start": {}, "intervals": [1]}',
        b'{"start": {}, "intervals": [{"sum": {"seconds": 1}}]}',
        b'{"start": {}, "intervals": [{"sum": {"seconds": 0, "bits_per_second": 1}}]}',
        b'{"start": {}, "intervals": [{"sum": {"seconds": 1, "bits_per_second": -1}}]}',
        b'{"start": {}, "intervals": [{"sum": {"seconds": 1, "bits_per_second": 1, "omitted": true}}]}',
    ],
    "dashjs": [
        b"[]",
        b"const A = [];",
        b'[{"speed": 1}]',
        b"[{speed: 1, duration: 0}]",
        b"[{speed: -1, duration: 1}]",
        b"[{speed: fast, duration: 1}]",
        b"[" * 100_000,
    ],
    "oboe": [
        b"0 1\n1 1\n2 1\n",
        b"0 1\n1 2\n",
        b"5 1\n1 1\n",
        b"5 1\n5 1\n",
        b"0 -1\n1 -1\n",
        b"0 1\n1 1\n1e15 2\n2e15 2\n",
    ],
    "purdue": [b"0 1\n0 2\n", b"-1 5\n1 5\n", b"0 -1\n", b"0 inf\n"],
    "norway-hsdpa": [
        b"1 2 3 4 5\n",
        b"1 2 3 4 5 0\n",
        b"1 2 3 4 -5 6\n",
        b"1 2 3 4 5 -6\n",
        b"1 2 3 4 5 6\n1 1 3 4 5 6\n",
        b"1 2 3 4 nan 6\n",
        b"1 2 3 4 1e12 1\n",
    ],
    "ghent-4g": [b"1453121790686 1 2 3 4\n", b"1453121790686 1 2 3 4 0\n"],
    "sabre": [
        b"[]",
        b"{}",
        b"[1]",
        b"[",
        b'[{"duration_ms": 1}]',
        b'[{"duration_ms": 0, "bandwidth_kbps": 1}]',
        b'[{"duration_ms": -1, "bandwidth_kbps": 1}]',
        b'[{"duration_ms": 1, "bandwidth_kbps": -1}]',
        b'[{"duration_ms": 1, "bandwidth_kbps": NaN}]',
        b'[{"duration_ms": 1, "bandwidth_kbps": 1e999}]',
        b'[{"duration_ms": 1, "bandwidth_kbps": "fast"}]',
        b'[{"duration_ms": true, "bandwidth_kbps": 1}]',
        b'[{"duration_ms": 1, "bandwidth_kbps": 1, "latency_ms": -5}]',
        b'[{"duration_ms": 1, "bandwidth_kbps": %s}]' % HUGE,
        b'[{"duration_ms": 1, "bandwidth_kbps": %s}]' % (b"9" * 5000),
        b"[" * 100_000,
    ],
    "cachegen": [
        b'{"bw": []}\n',
        b'{"bw": 1}\n',
        b"[1]\n",
        b'{"bw": [-1]}\n',
        b'{"bw": [NaN]}\n',
        b'{"bw": ["x"]}\n',
        b"{\n",
    ],
    "fcc": [
        b"1,2016-06-01 00:05:11,t,a,1,2\n",
        b"1,yesterday,t,a,1,2,3\n",
        b"1,2016-06-01 00:05:11,t,a,1,2,-3\n",
        b"1,2016-06-01 00:05:11,t,a,1,2,nan\n",
        b"unit_id,dtime\n",
        b'"%s",b\n' % (b"x" * 200_000),
    ],
    "ucc-5g": [
        b"Timestamp,Speed\n",
        b"Timestamp,DL_bitrate\n",
        b"Timestamp,DL_bitrate\nnow,5\n",
        b"Timestamp,DL_bitrate\n2019.12.16_13.40.04\n",
        b"Timestamp,DL_bitrate\n2019.12.16_13.40.04,-5\n",
        b"Timestamp,DL_bitrate\n2019.12.16_13.40.04,-\n",
        b"Timestamp,DL_bitrate\n2019.12.16_13.40.04,5\n2019.12.16_13.40.03,5\n",
    ],
    "puffer": [
        b"session_id,delivery_rate\n",
        b"time (ns GMT),session_id,index,delivery_rate\n",
        b"time (ns GMT),session_id,index,delivery_rate\n1,a,0\n",
        b"time (ns GMT),session_id,index,delivery_rate\n1,a,0,-1\n",
        b"time (ns GMT),session_id,index,delivery_rate\n2000000000,a,0,1\n1000000000,a,0,1\n",
    ],
    "csv": [
        b"duration_s\n1\n",
        b"duration_s,rate_bps\n",
        b"duration_s,rate_bps,colour\n1,2,3\n",
        b"duration_s,time_s,rate_bps\n1,2,3\n",
        b"duration_s,duration_s,rate_bps\n1,2,3\n",
        b"duration_s,rate_bps\n1\n",
        b"duration_s,rate_bps\n0,1\n",
        b"duration_s,rate_bps\n-1,1\n",
        b"duration_s,rate_bps\n1,-1\n",
        b"duration_s,rate_bps\n1,nan\n",
        b"duration_s,rate_bps\n1,inf\n",
        b"duration_s,rate_bps\n1,fast\n",
        b"duration_s,rate_bps,loss\n1,1,2\n",
        b"duration_s,rate_bps\n1e-320,1\n",
        b"duration_s,rate_bps\n1e308,1e13\n",
        b"time_s,rate_bps\n1,1\n1,1\n",
        b"time_s,rate_bps\n2,1\n1,1\n",
    ],
    "kvstream": [
        b"duration_s,rate_bps\n1,1\n",
        b"# kvstream-trace 1\n",
        b"# kvstream-trace 1\nduration_s,rate_bps\n",
        b"# kvstream-trace 1\n# colour: red\nduration_s,rate_bps\n1,1\n",
        b"# kvstream-trace 1\n# end: loop\n# end: loop\nduration_s,rate_bps\n1,1\n",
        b"# kvstream-trace 1\n# end: bounce\nduration_s,rate_bps\n1,1\n",
        b"# kvstream-trace 1\n# per: chunk\nduration_s,rate_bps\n1,1\n",
        b"# kvstream-trace 1\n# provenance: {\nduration_s,rate_bps\n1,1\n",
        b"# kvstream-trace 1\n# provenance: {}\nduration_s,rate_bps\n1,1\n",
        b'# kvstream-trace 1\n# provenance: {"source": 1, "format": "x"}\nduration_s,rate_bps\n1,1\n',
        b'# kvstream-trace 1\n# provenance: {"source": "", "format": "x", "transforms": 1}\nduration_s,rate_bps\n1,1\n',
        b"# kvstream-trace 1\nrate_bps,duration_s\n1,1\n",
        b"# kvstream-trace 1\nduration_s,rate_bps,rate_bps\n1,1,1\n",
        b"# kvstream-trace 1\nduration_s,rate_bps\n1\n",
        b"# kvstream-trace 1\nduration_s,rate_bps\n0,1\n",
        b"# kvstream-trace 1\nduration_s,rate_bps\n1,-1\n",
        b"# kvstream-trace 1\nduration_s,rate_bps\n1,1e15\n",
        b"# kvstream-trace 1\nduration_s,rate_bps\n1,1\n# late: comment\n",
        b"# kvstream-trace 1\n# sha256: 00\nduration_s,rate_bps\n1,1\n",
    ],
}


@pytest.mark.parametrize(("format", "data"), [(name, data) for name, many in BAD_LINES.items() for data in many])
def test_bad_lines_are_refused_in_one_line(format, data):
    with pytest.raises(TraceError) as caught:
        formats.loads(data, "log.txt", format)
    message = str(caught.value)
    assert message.startswith("log.txt")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("format", "data", "line"),
    [
        ("csv", b"duration_s,rate_bps\n1,1\n1,-1\n", 3),
        ("pensieve", b"0 1\n\n1 2\n1 3\n", 4),
        ("mahimahi", b"1\n2\n1\n", 3),
        ("norway-hsdpa", b"1 2 3 4 5 6\n1 3 3 4 5 0\n", 2),
        ("kvstream", b"# kvstream-trace 1\nduration_s,rate_bps\n1,1\n1,x\n", 4),
        ("ucc-5g", b"Timestamp,DL_bitrate\n2019.12.16_13.40.04,1\nbad,2\n", 3),
    ],
)
def test_complaints_name_the_line(format, data, line):
    with pytest.raises(TraceError, match=rf"^log\.txt:{line}: "):
        formats.loads(data, "log.txt", format)


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\x00\x01\x02", "not text"),
        (b"\xff\xfe\x80", "not text"),
    ],
)
def test_what_is_no_text_is_refused(format, data, says):
    with pytest.raises(TraceError, match=says):
        formats.loads(data, "log.bin", format)


def test_sizes_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr("kvstream.traces.formats.text.MAX_FILE_BYTES", 100)
    path = tmp_path / "big.csv"
    path.write_bytes(b"0 1\n" * 100)
    with pytest.raises(TraceError, match="at most 100"):
        formats.load(path)
    monkeypatch.setattr("kvstream.traces.formats.text.MAX_FILE_BYTES", 10_000)
    monkeypatch.setattr("kvstream.traces.formats.numbers.MAX_ROWS", 3)
    with pytest.raises(TraceError, match="more than 3 rows"):
        formats.loads(b"".join(b"%d 1\n" % i for i in range(9)), "t", "pensieve")


def test_windows_line_ends_and_byte_order_marks_are_read():
    trace = formats.loads(b"\xef\xbb\xbfduration_s,rate_bps\r\n1,5\r\n", "t.csv")
    assert trace.rates_bps.tolist() == [5.0]


SAMPLES = sorted(path.read_bytes() for path in DATA.iterdir())


@given(st.sampled_from(SAMPLES), st.integers(0, 2**30), st.binary(max_size=6), st.sampled_from([None, *FORMATS]))
@settings(max_examples=300)
def test_damaged_files_never_raise_anything_else(data, at, junk, format):
    at %= len(data)
    damaged = data[:at] + junk + data[at + len(junk) :]
    said = ""
    try:
        assert formats.loads(damaged, "t", format).mean_bps >= 0.0
    except TraceError as error:
        said = str(error)
    assert "\n" not in said


def test_every_format_says_unit_edge_and_kind_and_has_a_sample():
    sampled = {format for _, format, *_ in GOLDEN}
    for name, format in FORMATS.items():
        assert format.name == name
        assert format.unit
        assert format.edge
        assert format.kind in ("capacity", "achieved") or (format.kind is None and name == "kvstream")
        assert name in sampled | {"rates"}  # which needs settings: test_reading.py
        assert name in BAD_LINES
    docs = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    assert all(re.search(rf"`{name}`", docs) for name in FORMATS)
