from __future__ import annotations

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import thresholds

SUMMARY = {
    "schemes": [
        {
            "scheme": "cachegen", "n": 20, "met_rate": 0.8, "met_low": 0.58, "met_high": 0.92, "distortion": 0.02,
            "regret": None, "ttft_p95_s": 1.2, "answers_right": 18, "answers": 20,
        }
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "violated"),
    [
        ("cachegen.violations>0.1", False),  # 20 % measured, but the interval reaches down to 8 %
        ("cachegen.violations>0.05", True),
        ("cachegen.met<0.95", True),
        ("cachegen.met<0.9", False),
        ("cachegen.distortion>0.01", True),
        ("cachegen.distortion > 0.03", False),
        ("cachegen.ttft_p95>1100ms", True),
        ("cachegen.answers<95%", True),
        ("cachegen.regret>0", True),  # not measured is a violation
    ],
)
def test_a_threshold_is_judged_at_the_favourable_end_of_the_interval(text, violated):
    assert thresholds.judge(thresholds.parse(text), SUMMARY).is_violated == violated


@pytest.mark.parametrize(("limit", "violated"), [("0.3", False), ("0.05", True)])
def test_without_an_interval_that_of_independent_units_has_to_do(limit, violated):
    """One of three missed on a single trace: noise, and no reason to fail a job."""
    entry = {"scheme": "cachegen", "n": 3, "met": 2, "met_rate": 2 / 3, "met_low": None, "met_high": None}
    found = thresholds.judge(thresholds.parse(f"cachegen.violations>{limit}"), {"schemes": [entry]})
    assert found.is_violated == violated


@pytest.mark.parametrize(
    "text", ["", "cachegen", "cachegen.violations", "cachegen.speed>1", "cachegen.met>fast", "a.met worse by 0.1"]
)
def test_malformed_thresholds_are_refused(text):
    with pytest.raises(SpecError, match="fail-if"):
        thresholds.parse(text)


def test_names_of_schemes_may_hold_a_plus():
    assert thresholds.parse("cachegen+compute-depth1.violations>0.1").scheme == "cachegen+compute-depth1"


def test_a_scheme_that_did_not_run_is_an_error():
    with pytest.raises(SpecError, match="cachegen"):
        thresholds.judge(thresholds.parse("bola.met<1"), SUMMARY)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.violations>20", "violations is a share from 0 to 1; 20 % is 0.2"),
        ("a.met<-0.1", "met is a share from 0 to 1"),
        ("a.answers<150%", "answers is a share from 0 to 1"),
    ],
)
def test_what_is_no_share_is_refused(text, says):
    with pytest.raises(SpecError, match=says):
        thresholds.parse(text)


EIGHT = [f"trace-{i % 8}" for i in range(8)]


@pytest.mark.parametrize(
    ("text", "traces", "says"),
    [
        ("a.violations>0.9", ["x", "x"], "2 units on 1 trace.*use at least 35 traces, or violations>0.34 at most"),
        ("a.violations>0.9", EIGHT, "8 units on 8 traces.*use at least 35 traces, or violations>0.67 at most"),
        ("a.met<0.1", EIGHT, "use at least 35 traces, or met<0.33 at most"),
        ("a.violations>=1", EIGHT, "whatever is measured: violations>0.67 at most"),
        ("a.answers>1", EIGHT, "answers is never above 1"),
        ("a.distortion<0", EIGHT, "distortion is never below 0"),
    ],
)
def test_what_cannot_fail_is_refused_with_a_hint(text, traces, says):
    with pytest.raises(SpecError, match=says):
        thresholds.check([thresholds.parse(text)], ["a"], traces)


@pytest.mark.parametrize("text", ["a.violations>0.67", "a.met<0.33", "a.violations>=0.67", "a.bytes>1GB"])
def test_the_hint_can_fail(text):
    thresholds.check([thresholds.parse(text)], ["a"], EIGHT)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_so_many_traces_are_enough_and_one_fewer_is_not(share):
    need = thresholds.traces_to_reach(share)
    assert thresholds.reach([str(i) for i in range(need)]) > share
    assert need == 4 or thresholds.reach([str(i) for i in range(need - 1)]) <= share


def test_no_interval_lies_higher_than_what_is_said_to_be_possible():
    """Tried out: every outcome of six units on four traces, one of them with three units."""
    import itertools

    from kvstream.testbed.results import stats

    traces = ["a", "a", "a", "b", "c", "d"]
    highest = max(stats.rate(outcome, traces).low for outcome in itertools.product([True, False], repeat=6))
    assert thresholds.reach(traces) == pytest.approx(highest)
