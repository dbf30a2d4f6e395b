"""Request traces in Mooncake's format, hostile ones too, and when requests come."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.testbed.errors import SpecError
from kvstream.testbed.workloads import arrivals, request_trace
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS, SAMPLE, parse
from tests.test_docs import script

ROW = {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}


def line(**changes: object) -> str:
    return json.dumps(ROW | changes) + "\n"


def test_a_trace_is_read_in_the_order_of_time():
    rows = [line(timestamp=2500.5), line(timestamp=500, input_length=600, hash_ids=[7, 10]), "\n", line(type="chat")]
    trace = parse(rows, "name", "file")
    assert trace.arrivals_s.tolist() == pytest.approx([0.0, 0.5, 2.5005])
    assert trace.tokens.tolist() == [1100, 600, 1100]
    assert [trace.blocks[a:b].tolist() for a, b in zip(trace.firsts, trace.firsts[1:], strict=False)] == [
        [0, 1, 2], [0, 3], [0, 1, 2],
    ]  # fmt: skip
    assert trace.n_blocks == 4
    assert trace.rate == pytest.approx(2 / 2.5005)
    assert trace.reusable == pytest.approx((BLOCK_TOKENS + 2 * BLOCK_TOKENS) / 2800)


def test_a_trace_that_is_repeated_has_new_contents():
    trace = parse([line(), line(timestamp=1000)], "name", "file")
    long = trace.repeated(5, start=1)
    assert long.arrivals_s.tolist() == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])
    assert long.blocks.reshape(5, 3)[:, 0].tolist() == [0, 3, 3, 6, 6]
    assert long.n_blocks == 9
    assert trace.repeated(1).tokens.tolist() == [1100]


def test_the_shipped_trace_is_what_its_script_draws_and_repeats_itself():
    assert SAMPLE.read_text() == script("make_requests").text()
    trace = request_trace.read(SAMPLE)
    assert len(trace) == 600
    assert 0.5 < trace.reusable < 0.9
    assert (np.diff(trace.firsts) == -(-trace.tokens // BLOCK_TOKENS)).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no requests"), ("{", "line 1: not JSON"), ("[1]\n", "line 1: not an object"),
        (line() + line(timestamp=-1), "line 2: timestamp"), (line(timestamp=None), "timestamp is missing"),
        (line(timestamp=1e300), "timestamp"), (line(timestamp=True), "timestamp"), (line(timestamp="3"), "timestamp"),
        (line(timestamp=float("nan")), "timestamp is nan"),
        (line(input_length=0), "input_length is 0"), (line(input_length=10**9), "input_length"),
        (line(input_length=1.5), "input_length is 1.5"), (line(input_length=10**4000), "input_length|JSON"),
        (line(output_length=-1), "output_length"), (line(hash_ids=None), "hash_ids"),
        (line(hash_ids=[1.0]), "hash_ids"),
        (line(hash_ids=[-1]), "hash_ids"), (line(hash_ids=[2**63]), "hash_ids"), (line(hash_ids="123"), "hash_ids"),
        (line(hash_ids=[1, 2, 3, 4]), "4 hash_ids for 1100 tokens"), (line(hash_ids=[True]), "hash_ids"),
        ("[" * 100_000, "characters|nested"), (line(hash_ids=list(range(20_000))), "characters"),
    ],
    ids=range(23),
)  # fmt: skip
def test_a_hostile_trace_is_refused_with_its_line(text, says, tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(SpecError, match=says) as refused:
        request_trace.read(file)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_what_is_no_text_or_no_file_is_refused(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path / "none.jsonl"):
        with pytest.raises(SpecError, match="request trace"):
            request_trace.read(path)


@given(st.lists(st.dictionaries(st.sampled_from(sorted(ROW)), st.one_of(
    st.integers(-10, 10**7), st.floats(), st.none(), st.lists(st.integers(0, 50), max_size=5), st.text(max_size=3),
)), max_size=4))  # fmt: skip
def test_whatever_comes_is_understood_or_refused(changes):
    try:
        trace = parse([line(**change) for change in changes], "name", "file")
    except SpecError:
        return
    assert (np.diff(trace.arrivals_s) >= 0.0).all()
    assert trace.firsts[-1] == len(trace.blocks)
    assert (np.diff(trace.firsts) <= -(-trace.tokens // BLOCK_TOKENS)).all()


# --- arrivals


@pytest.mark.parametrize("text", ["poisson", "bursts,size=5", "trace"])
def test_arrivals_have_their_rate_and_scale_with_it(text):
    trace, kind = request_trace.read(SAMPLE).repeated(20_000), arrivals.parse(text)
    slow, fast = (arrivals.times_s(kind, trace, rate, 1) for rate in (2.0, 8.0))
    assert (np.diff(slow) >= 0.0).all()
    assert len(trace) / slow[-1] == pytest.approx(2.0, rel=0.05)
    assert slow == pytest.approx(4.0 * fast)


def test_bursts_come_at_once_and_are_as_large_as_said():
    trace = request_trace.read(SAMPLE).repeated(20_000)
    times_s = arrivals.times_s(arrivals.Bursts(5.0), trace, 1.0, 3)
    assert len(times_s) / len(np.unique(times_s)) == pytest.approx(5.0, rel=0.05)
    assert len(np.unique(arrivals.times_s(arrivals.Poisson(), trace, 1.0, 3))) == len(trace)


@pytest.mark.parametrize("text", ["uniform", "bursts,size=0.5", "bursts,size=inf", "poisson,size=3"])
def test_unknown_arrivals_are_refused(text):
    with pytest.raises(SpecError):
        arrivals.parse(text)


def test_a_trace_without_time_has_no_rate():
    trace = parse([line(), line()], "name", "file")
    with pytest.raises(SpecError, match="at once"):
        arrivals.times_s(arrivals.Traced(), trace, 1.0, 1)
