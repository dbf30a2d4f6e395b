"""Reading whatever people have: encodings, line ends, headers, settings for what a file leaves open, and any size."""

from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.traces import formats
from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers, text
from kvstream.traces.formats.base import Options
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.generators import uniform
from kvstream.traces.resolve import open_trace

UP = 1.0 / goodput_per_capacity()
ROWS = b"0\t1.5\n5\t2\n10\t3\n"


def read(data: bytes, spec: str = "") -> formats.Trace:
    """As a spec reads it, settings and all."""
    file = Path("t.log")
    file.write_bytes(data)
    return open_trace(str(file) + spec)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the same rows, however they are written


@pytest.mark.parametrize(
    "data",
    [
        ROWS.replace(b"\n", b"\r\n"),
        ROWS.replace(b"\n", b"\r"),
        ROWS.rstrip(b"\n"),
        b"\n" * 200 + ROWS,
        b"\xef\xbb\xbf" + ROWS,
        ROWS.decode().encode("utf-16"),
        b"\xff\xfe" + ROWS.decode().encode("utf-16-le"),
        b"\xfe\xff" + ROWS.decode().encode("utf-16-be"),
        gzip.compress(ROWS, mtime=0),
        gzip.compress(ROWS[:8], mtime=0) + gzip.compress(ROWS[8:], mtime=0),
        b"# time bw\n" + ROWS,
        b"time bw\n" + ROWS,
        b"# caf\xe9\n" + ROWS,
        ROWS.replace(b"5\t", b"# in between\n\n5\t"),
        ROWS.replace(b"\t", b","),
        ROWS.replace(b"\t", b" ; "),
        ROWS.replace(b"\t", b"   ").replace(b"\n", b" \n"),
    ],
)
def test_cooked_rows_are_read_however_they_are_written(data):
    trace = read(data)
    assert trace.provenance[0].format == "pensieve"
    assert trace.durations_s.tolist() == [5.0, 5.0]
    assert trace.rates_bps / UP == pytest.approx([2e6, 3e6])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_blocks_cut_anywhere_make_the_same_lines(monkeypatch, size, ends):
    monkeypatch.setattr(text, "BLOCK_BYTES", size)
    lines = [b"a,1", b"", b"# c", b"", b"", "é".encode(), b"2"]
    found = list(text.Text.of(ends.join(lines), "t").lines())
    assert found == [(i, line.decode()) for i, line in enumerate(lines, 1)]
    assert read(ROWS.replace(b"\n", ends)) == read(ROWS)


def test_complaints_name_the_line_in_whatever_block_it_is(monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 16)
    rows = b"# comment\ntime bw\n" + b"".join(b"%d %d.5\n" % (i, i) for i in range(50))
    for bad, says in (
        (b"50 x\n", "column 2 is 'x'"),
        (b"50\n", "1 columns"),
        (b"50 -1\n", "-1"),
        (b"49 1\n", "repeats"),
    ):
        with pytest.raises(TraceError, match=rf"^t\.log:53: .*{says}"):
            read(rows + bad, ",format=pensieve")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\3\4rest", "a zip archive; unpack it first"),
        (b"BZh91AY", "a bzip2 archive"),
        (gzip.compress(ROWS, mtime=0)[:-9], "damaged gzip"),
        (b"\x1f\x8bnonsense", "damaged gzip"),
        (gzip.compress(b"", mtime=0), "empty"),
        (ROWS.decode().encode("utf-16-le"), "zero bytes"),
        (b"\xff\xfe\x30\xd8\x0a\x00", "damaged UTF-16"),
        (b"1 \xe9\x07\n", "not text"),
        (b"# only a comment\n", "nothing but comments"),
    ],
)
def test_what_cannot_be_read_says_why(data, says):
    with pytest.raises(TraceError, match=says) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_a_packed_file_is_bounded_by_what_it_holds(monkeypatch):
    monkeypatch.setattr(text, "MAX_FILE_BYTES", 1000)
    with pytest.raises(TraceError, match="at most 1000: cut it"):
        read(gzip.compress(b"0 1\n" * 1000, mtime=0))
    monkeypatch.setattr(text, "MAX_WHOLE_BYTES", 100)
    with pytest.raises(TraceError, match="more than 100 bytes of JSON; write it as CSV"):
        read(b"[\n" + b" \n" * 200)
    monkeypatch.setattr(text, "BLOCK_BYTES", 50)
    with pytest.raises(TraceError, match="a line of more than 100 bytes"):
        read(b"1" * 300)


# ---- numbers


decimals = st.one_of(
    st.decimals(0, 10**9, places=6, allow_nan=False).map(lambda d: f"{d:f}"),
    st.integers(0, 10**20).map(str),
    st.floats(0, 1e300, allow_nan=False).map(repr),
    st.sampled_from(["0", "007", ".5", "5.", "+1", "1e3", "0.1", "999999999999999", "0.3000000000000000444"]),
)


@given(st.lists(st.tuples(decimals, decimals), min_size=1, max_size=30), st.sampled_from([",", " ", "\t", ";"]))
@settings(max_examples=200)
def test_numbers_are_those_that_python_reads(rows, separator):
    content = "".join(f"{a}{separator}{b}\n" for a, b in rows)
    table = numbers.table(text.Text.of(content.encode(), "t"), 2)
    for column, values in zip(table.columns, zip(*rows, strict=True), strict=True):
        assert column.tolist() == [float(value) for value in values]
    assert table.whole == tuple(all(value.isdigit() for value in values) for values in zip(*rows, strict=True))


@pytest.mark.parametrize("field", ["1_0", "0x10", "1.2.3", "1-2", ".", "-", "1e", "1,2", "--1", "1e5e5", "١"])
def test_what_is_no_number_is_none(field):
    with pytest.raises(TraceError, match=r"^t:2: "):
        numbers.table(text.Text.of(f"1;2\n{field};2\n".encode(), "t"), 2)


# ---- settings for what a file leaves open


def test_a_unit_is_given_to_pairs_and_to_columns():
    assert read(b"0 25000\n1 30000\n2 28000\n", ",unit=kbps").rates_bps.tolist() == [25e6, 30e6, 28e6]
    assert read(b"0 25000000\n1 30000000\n", ",unit=bps").rates_bps.tolist() == [25e6, 30e6]
    assert read(b"0 5\n5 3\n", ",unit=MB/s").bits_by(10.0) == pytest.approx(5 * 40e6 + 5 * 24e6)
    column = read(b"10\n10\n12\n15\n", ",unit=Mbps,step=500ms")
    assert column.rates_bps.tolist() == [10e6, 10e6, 12e6, 15e6]
    assert column.durations_s.tolist() == [0.5] * 4
    assert column.provenance[0].format == "rates"
    assert read(b"15.375,15.375,13.0\n", ",unit=Mbps,step=1s").rates_bps.tolist() == [15.375e6, 15.375e6, 13e6]
    assert read(b"rate\n1.5\n# pause\n2.5\n", ",unit=kbps,step=1s").rates_bps.tolist() == [1500.0, 2500.0]


def test_columns_are_named_by_place_by_number_and_by_name():
    wanted = [5e6, 6e6]
    logged = b"timestamp,bandwidth_mbps\n0,5\n1,6\n"
    assert read(logged, ",columns=time_s=timestamp:rate_mbps=bandwidth_mbps").rates_bps.tolist() == wanted
    assert read(b"time_s,rate_mbps,rsrp\n0,5,-80\n1,6,-81\n", ",columns=time_s:rate_mbps").rates_bps.tolist() == wanted
    assert read(b"1.0\t123\t5.0\n2.0\t123\t6\n", ",columns=time_s:_:rate_mbps").rates_bps.tolist() == wanted
    assert read(b"1.0\t123\t5.0\n2.0\t123\t6\n", ",columns=rate_mbps=3:time_s=1").rates_bps.tolist() == wanted
    texts = b'cell,t,note,rate\n"a, b",0,LTE,5\nc,1,,6\n'
    assert read(texts, ",columns=time_s=t:rate_mbps=rate").rates_bps.tolist() == wanted
    assert read(texts.replace(b'"a, b"', b"ab"), ",columns=time_s=2:rate_mbps=4").rates_bps.tolist() == wanted
    goodput = read(logged, ",columns=time_s=1:goodput_mbps=2")
    assert goodput.kind == "achieved"
    assert goodput.rates_bps / UP == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("header", "factor"),
    [
        (b"rate_bps", 1.0),
        (b"rate_kbps", 1e3),
        (b"rate_Mbps", 1e6),
        (b"Rate_mbps", 1e6),
        (b"rate_Gbps", 1e9),
        (b"rate_MBps", 8e6),
        (b"rate_kBps", 8e3),
        (b"rate_Bps", 8.0),
        (b"rate_MB/s", 8e6),
    ],
)
def test_units_of_headers_tell_bits_from_bytes(header, factor):
    assert read(b"time_s," + header + b"\n0,5\n1,6\n").rates_bps.tolist() == [5 * factor, 6 * factor]


def test_semicolons_and_decimal_commas():
    assert read(b"time_s;rate_mbps\n0;5\n1;6\n").rates_bps.tolist() == [5e6, 6e6]
    commas = read(b"time_s;rate_mbps\n0,5;5,25\n1,5;6\n")
    assert (commas.rates_bps.tolist(), commas.durations_s.tolist()) == ([5.25e6, 6e6], [1.0, 1.0])
    assert "decimal commas" in commas.provenance[0].transforms


BACK = b"Timestamp,DL_bitrate\n" + b"".join(
    b"2019.11.27_07.45.%d,%d\n" % pair for pair in ((20, 5), (21, 6), (20, 14), (21, 14), (22, 14))
)


def test_loggers_that_step_back_are_repaired_on_request():
    with pytest.raises(TraceError, match=r"t\.log:4: time falls; .*repair=sort, or repair=drop"):
        read(BACK)
    mended = read(BACK, ",repair=sort")
    assert mended.rates_bps / UP == pytest.approx([9.5e3, 10e3, 14e3])
    assert any("1 steps back: rows sorted" in note for note in mended.provenance[0].transforms)
    dropped = read(BACK, ",repair=drop")
    assert dropped.rates_bps / UP == pytest.approx([5e3, 6e3, 14e3])
    assert any("dropped, 2 of 5 left out" in note for note in dropped.provenance[0].transforms)
    cooked = b"0 1.5\n2 2.5\n1 3.5\n3 4.25\n"
    assert read(cooked, ",format=pensieve,repair=sort").rates_bps / UP == pytest.approx([3.5e6, 2.5e6, 4.25e6])
    assert read(cooked, ",format=pensieve,repair=drop").rates_bps / UP == pytest.approx([2.5e6, 4.25e6])


def test_lumos5g_rows_last_a_second_each():
    logged = read(b"0 74.0\n1 98.0\n1 89.5\n4 114.0\n5 132.0\n")
    assert logged.durations_s.tolist() == [1.0] * 5
    assert "2 rows not 1 s after the one before, each held 1 s" in logged.provenance[0].transforms


def test_mahimahi_at_its_own_grain():
    stamps = b"1\n1\n3\n60\n"
    fine = read(stamps, ",bin=1ms")
    assert len(fine) == 60
    assert fine.rates_bps[[0, 1, 2, 59]] == pytest.approx([2 * 12112e3, 0.0, 12112e3, 12112e3])
    assert fine.bits_by(0.06) == pytest.approx(read(stamps).bits_by(0.06))


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        ("stamp_time,x,my_mbps\n0,1,2\n1,1,3\n", "columns=time_s=stamp_time:rate_mbps=my_mbps"),
        (f"stamp_time,x,mbps{'9' * 5000}\n0,1,2\n1,1,3\n", "columns=time_s=stamp_time:rate_mbps=3"),
        (",".join(map(str, range(4000))) + "\n" + ",".join(map(str, range(4000))), "columns=time_s=1:rate_mbps=4000"),
        (":".join(["rate_mbps"] * 900).replace(":", ",") + ",time_s,what\n" + "1," * 901 + "1\n", "columns=time_s="),
    ],
)
def test_a_message_says_which_columns_to_take_and_stays_short(table, advice):
    with pytest.raises(TraceError) as found:
        read(table.encode())
    assert advice in str(found.value)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    "piece", [b"9", b"9.", b"9e", b"/*", b"[{", b"a=[", b"speed:", b"'", b'"', b" ", b"1,", b"{},", b"-", b"\t;"]
)
@pytest.mark.parametrize("end", [b"", b"x", b"\n1,2\n"])
def test_a_long_line_takes_no_quadratic_time(piece, end):
    """Which would be hours: the time limit of the tests ends it."""
    said = ""
    try:
        read(piece * (400_000 // len(piece)) + end)
    except TraceError as error:
        said = str(error)
    assert len(said) < 2_000
    assert "\n" not in said


@pytest.mark.parametrize("spec", ["s\0" * 250, "s\0" * 250 + ",start=x", "uniform,low=1Mbps,high=" + "\1" * 400])
def test_a_message_about_a_name_that_cannot_be_printed_stays_short(spec):
    with pytest.raises(TraceError) as found:
        open_trace(spec)
    assert len(str(found.value)) < 2_000


@pytest.mark.parametrize("header", [b"rate_5Mbps", b"rate_e-400bps", b"rate_.5kbps", b"rate_", b"rate_bps5"])
def test_a_unit_in_a_header_has_no_number(header):
    """It was read as one: `rate_5Mbps` multiplied with 15 Mbit/s."""
    with pytest.raises(TraceError, match="column"):
        read(b"time_s," + header + b"\n0,5\n1,6\n")


def test_numbers_beyond_a_float_are_refused_without_a_warning():
    huge = b"9" * 400
    with pytest.raises(TraceError):
        read(b"0 " + huge + b"\n" + huge + b" 5\n" + huge + b"1 5\n", ",format=pensieve")
    with pytest.raises(TraceError):
        read(b"0 " + huge + b"\n" + huge + b" 5\n" + huge + b"1 5\n")


def test_columns_of_delay_and_loss_are_dropped_on_request():
    table = b"time_s,rate_mbps,delay_ms,loss\n0,5,20,0\n1,6,30,0.1\n"
    bare = read(table, ",drop=delay")
    assert (bare.delay_s, bare.loss.tolist()) == (None, [0.0, 0.1])
    assert bare.provenance[0].transforms == ("delay dropped",)
    with pytest.raises(TraceError, match="'rate' cannot be dropped; choose from delay, loss"):
        read(table, ",drop=rate")


@pytest.mark.parametrize(
    ("data", "spec", "says"),
    [
        (b"1\n2\n", ",unit=Mbps", "needs unit= and step="),
        (b"1\n2\n", ",step=1s", "needs unit= and step="),
        (b"1\n2\n", ",unit=furlongs,step=1s", "unit=furlongs: no unit of a rate"),
        (b"1\n2\n", ",unit=Mbps,step=0s", "step must be above 0"),
        (b"1\n2\n", ",unit=Mbps,step=1", "'1' has no unit; write 1s or 1ms"),
        (b"5\n4\n", "", "if they are rates, set unit= and step="),
        (b"1.5\n2.5\n", "", "if they are rates, set unit= and step="),
        (b"15.375,15.375,13.0\n", "", "if they are rates, set unit= and step="),
        (b"1\n2\n", ",bin=0.5ms", "give whole milliseconds"),
        (b"1\n2\n", ",bin=1s,format=csv", "format csv has no setting bin; it takes columns, unit, repair"),
        (ROWS, ",repair=glue", "repair=glue; choose from sort, drop"),
        (ROWS, ",repair=sort,format=oboe", "format oboe has no setting repair; it takes none"),
        (ROWS, ",part=all", "part=all makes a set of traces"),
        (ROWS, ",part=0", "holds one trace; omit part=0"),
        (b"timestamp,bandwidth_mbps\n0,5\n", "", "columns=time_s=timestamp:rate_mbps=bandwidth_mbps"),
        (b"time_ms;thr_kBps\n0;5\n", "", "columns=time_ms=time_ms:rate_kBps=thr_kBps"),
        (b"time_s,rate_mbps,rsrp\n0,5,-80\n", "", r"unknown column 'rsrp'; set columns=time_s:rate_mbps,"),
        (b"1.0 123 5.0\n2.0 123 6.0\n", "", "columns=time_s:_:rate_mbps"),
        (b"time_s,RATE_MBPS\n0,5\n", "", "bits or bytes.*rate_mbps=RATE_MBPS, or rate_MBps=RATE_MBPS for bytes"),
        (b"a,b\n0,5\n", ",columns=time_s=c:rate_mbps=b", "no column 'c'; there are a, b"),
        (b"a,b\n0,5\n", ",columns=time_s:rate_mbps:loss", "no column '3'; there are a, b"),
        (b"a,b\n0,5\n", ",columns=time_s:speed", "unknown column 'speed'"),
        (b"a,b\n0,5\n", ",columns=time_s:time_ms", "columns time_s, time_ms; a table has one of"),
        (b"a,b\n0,5\n1,6,7\n", ",columns=time_s:rate_mbps", "t.log:3: 3 columns; the header names 2"),
        (b"a,b\n0,5\n1,x\n", ",columns=time_s:rate_mbps", "t.log:3: rate_mbps is 'x'"),
        (b"n,a,b\nu,0,5\nv,1\n", ",columns=time_s=a:rate_mbps=b", "t.log:3: 2 columns"),
        (b"n,a,b\nu,0,5\nv,0,5\n", ",columns=time_s=a:rate_mbps=b", "t.log:3: time repeats"),
        (b"[{}]", "", "JSON of no known trace"),
        (b'{"network": [{"duration_ms": 1000, "bandwidth_kbps": 5}]}', "", "JSON of no known trace"),
        (b"[{]", "", "not JSON"),
    ],
)
def test_refusals_say_what_to_write(data, spec, says):
    with pytest.raises(TraceError, match=says) as caught:
        read(data, spec)
    assert "\n" not in str(caught.value)


def test_iperf3_streams_and_omitted_intervals():
    interval = '{"event": "interval", "data": {"sum": {"seconds": 1, "bits_per_second": 8e6, "omitted": %s}}}\n'
    stream = '{"event": "start", "data": {}}\n' + interval % "true" + interval % "false"
    trace = read(stream.encode())
    assert trace.rates_bps / UP == pytest.approx([8e6])
    assert "1 omitted intervals of the start-up left out" in trace.provenance[0].transforms


def test_profiles_of_dashjs_as_json():
    assert read(b'[{"speed": 500, "duration": 10}]').durations_s.tolist() == [10.0]
    several = b'{"slow": [{"speed": 500, "duration": 10}], "fast": [{"speed": 900, "duration": 5}]}'
    with pytest.raises(TraceError, match=r"holds 2 traces \(slow, fast\)"):
        read(several)
    assert read(several, ",part=1").rates_bps / UP == pytest.approx([900e3])


# ---- once, and in bounded memory


def test_a_file_of_the_same_content_is_parsed_once(monkeypatch):
    calls = []
    table = numbers.table
    monkeypatch.setattr(numbers, "table", lambda *given: calls.append(1) or table(*given))
    monkeypatch.setattr(formats, "_kept", type(formats._kept)())
    first = read(b"0 1.25\n1 2.25\n2 9.75\n", ",format=pensieve")
    assert read(b"0 1.25\n1 2.25\n2 9.75\n", ",format=pensieve,scale=2").bits_by(1.0) == 2 * first.bits_by(1.0)
    assert len(calls) == 1
    assert read(b"0 1.25\n1 2.25\n2 9.75\n", ",format=lumos5g") != first
    assert read(b"0 1.25\n1 2.25\n2 9.5\n", ",format=pensieve") != first
    assert len(calls) == 3
    monkeypatch.setattr(formats, "MAX_KEPT_ROWS", 4)
    read(b"0 1.25\n1 2.25\n2 9.25\n", ",format=pensieve")
    assert len(formats._kept) == 2


@pytest.mark.parametrize("format", ["csv", "pensieve", "kvstream", "sabre"])
def test_what_is_written_is_recognised_and_read_back(format):
    for trace in (uniform(seed=4, length=3.0), uniform(seed=4, length=3.0).scaled(1e-3)):
        Path("out").write_text(formats.dumps(trace, format))
        assert formats.sniff("out") == format
        assert formats.load("out").rates_bps == pytest.approx(trace.rates_bps)


def test_large_traces_answer_as_small_ones_do():
    n = 150_000
    rates = np.arange(n) % 7 * 1e6
    large = formats.Trace("large", np.full(n, 0.1), rates)
    assert large.bits_by(1000.05) == pytest.approx(float(rates[:10000].sum()) * 0.1 + 0.05 * rates[10000])
    assert large.rate_at(7.35) == rates[73]
    assert large.time_for(large.bits_by(1000.0), 0.0) == pytest.approx(1000.0, abs=0.11)
    assert large.bits_by(np.array([1000.05])) == pytest.approx([large.bits_by(1000.05)])
    assert pickle.loads(pickle.dumps(large)) == large
    assert large.shifted(3.0).rate_at(0.05) == rates[30]


MEMORY = """
import resource, sys
from kvstream.traces import formats
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trace = formats.load(sys.argv[1], options=formats.Options(bin_s=float(sys.argv[2])) if sys.argv[2] else None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, len(trace), trace.mean_bps)
"""


CSV = b"time_s,rate_bps\n" + b"".join(b"%.1f,%.1f\n" % (i / 10, i % 977 * 1e4) for i in range(900_000))


@pytest.mark.parametrize(
    ("content", "bin_s", "rows", "share"),
    [
        (CSV, "", 900_000, 3),
        (b"".join(b"%d\n" % (i // 84) for i in range(1, 4_000_000)), "0.001", 47619, 1),
    ],
    ids=["csv", "mahimahi"],
)
def test_memory_stays_below_a_few_times_the_file(content, bin_s, rows, share):
    """The peak of a process of its own, above what the imports take."""
    Path("large").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "large", bin_s],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(formats.__file__).resolve().parents[2])},
    )
    peak, found, mean_bps = (float(word) for word in done.stdout.split())
    assert found == rows
    assert mean_bps > 0.0
    assert peak < share * len(content) + 2**23


def test_options_that_are_given_are_named():
    assert Options(part=0, step_s=1.0, repair="sort").given() == {"part": 0, "step": 1.0, "repair": "sort"}
