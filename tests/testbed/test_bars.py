from __future__ import annotations

import pytest

from testbed import bars
from testbed.errors import SpecError

SUMMARY = {
    "schemes": [
        {
            "scheme": "cachegen", "n": 20, "met_rate": 0.8, "met_low": 0.58, "met_high": 0.92, "distortion": 0.02,
            "regret": None, "ttft_p95_s": 1.2, "answers_right": 18, "answers": 20,
        }
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("cachegen.violations>0.1", False),  # 20 % measured, but the interval reaches down to 8 %
        ("cachegen.violations>0.05", True),
        ("cachegen.met<0.95", True),
        ("cachegen.met<0.9", False),
        ("cachegen.distortion>0.01", True),
        ("cachegen.distortion > 0.03", False),
        ("cachegen.ttft_p95>1100ms", True),
        ("cachegen.answers<95%", True),
        ("cachegen.regret>0", True),  # unknown is not good enough
    ],
)
def test_a_bar_is_judged_on_the_bound(text, fails):
    assert (bars.missed(bars.parse(text), SUMMARY) is not None) == fails


@pytest.mark.parametrize("text", ["", "cachegen", "cachegen.violations", "cachegen.speed>1", "cachegen.met>fast"])
def test_what_is_no_bar_is_refused(text):
    with pytest.raises(SpecError, match="fail-if"):
        bars.parse(text)


def test_a_scheme_that_did_not_run_is_an_error():
    with pytest.raises(SpecError, match="cachegen"):
        bars.missed(bars.parse("bola.met<1"), SUMMARY)
