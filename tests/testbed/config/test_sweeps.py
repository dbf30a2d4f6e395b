"""Sweeps: one scheme becomes one for every combination of values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.testbed.config import experiment, sweeps
from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.errors import SpecError

POLICY = """
from dataclasses import dataclass
from kvstream import Choice

@dataclass
class Mine:
    safety: float = 0.8
    wait_s: float = 0.1
    def choose(self, obs):
        return Choice(0)
"""


def made(*sweep: str, schemes: Any = None, **more: Any) -> Experiment:
    data = {
        "name": "made",
        "contexts": ["docs"],
        "traces": ["steady"],
        "deadlines_s": [1.0],
        "sweep": list(sweep),
        "schemes": schemes or [{"policy": "kvstream", "codec": "kvstream"}, {"policy": "lowest", "codec": "kvstream"}],
    }
    return sweeps.expanded(experiment.from_dict(data | more))


def names(one: Experiment) -> list[str]:
    return [scheme.name for scheme in one.schemes]


def test_a_setting_is_swept_where_it_exists() -> None:
    one = made("policy.target=0.5,0.9")
    assert names(one) == ["kvstream(target=0.5)", "kvstream(target=0.9)", "lowest"]
    assert [scheme.policy for scheme in one.schemes] == ["kvstream,target=0.5", "kvstream,target=0.9", "lowest"]


def test_several_settings_give_every_combination() -> None:
    one = made("policy.target=0.5,0.9", "depth=1,2")
    assert names(one)[:4] == ["kvstream(target=0.5)-depth1", "kvstream(target=0.5)", "kvstream(target=0.9)-depth1",
                              "kvstream(target=0.9)"]  # fmt: skip
    assert names(one)[4:] == ["lowest-depth1", "lowest"]


def test_what_gives_the_setting_itself_and_reference_lines_stay() -> None:
    schemes = [{"policy": "kvstream,target=0.7", "codec": "kvstream"}, {"policy": "kvstream", "codec": "kvstream"},
               {"policy": "kvstream", "codec": "kvstream", "reference": True, "label": "line"}]  # fmt: skip
    one = made("policy.target=0.5,0.9", schemes=schemes)
    assert names(one) == ["kvstream(target=0.7)", "kvstream(target=0.5)", "kvstream(target=0.9)", "line"]


def test_labels_and_the_baseline_go_along() -> None:
    schemes = [{"policy": "kvstream", "codec": "kvstream", "label": "ours"}, {"policy": "lowest", "codec": "kvstream"}]
    one = made("policy.target=0.5,0.9", "policy.margin=0,0.1", schemes=schemes, baseline="ours")
    assert names(one)[0] == one.baseline == "ours(target=0.5,margin=0)"
    same = made("codec=kvstream,cachegen", baseline="lowest")
    assert same.baseline == "lowest-kvstream" in names(same)


def test_policies_from_files_by_any_name_of_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(POLICY)
    mine = [{"policy": "./mine.py:Mine", "codec": "kvstream"}]
    one = made("policy.safety=0.6,0.9", "policy.wait=10ms,0.2s", schemes=mine)
    assert names(one)[0] == "Mine(safety=0.6,wait=10ms)"
    assert len(one.schemes) == 4
    given_already = [{"policy": "./mine.py:Mine,wait_s=1", "codec": "kvstream"}]
    with pytest.raises(SpecError, match="every scheme that has it gives it itself"):
        made("policy.wait=10ms,0.2s", schemes=given_already)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("policy.targt=1,2", "no policy here has a setting 'targt'; did you mean target?"),
        ("policy.target", "write a setting and its values"),
        ("policy.target=0.5,,0.6", "write a setting and its values"),
        ("polcy.target=0.5", "unknown part 'polcy' of a scheme; did you mean policy?"),
        ("target=0.5,0.6", "did you mean policy.target or codec.target?"),
        ("policy.target=0.5,0.5", "a value is given twice"),
        ("depth=1,x", "depth"),
        ("depth=1,3", "depth is 3; use 1 or 2"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(SpecError) as error:
        made(text)
    assert says in str(error.value)


def test_a_setting_twice() -> None:
    with pytest.raises(SpecError, match=r"policy\.target is given twice"):
        made("policy.target=0.5,0.6", "policy.target=0.7,0.8")


def test_the_lines_of_the_figure() -> None:
    one = made("policy.target=0.5,0.9", "policy.margin=0,0.1")
    entries = [asdict(scheme) | {"name": scheme.name} for scheme in one.schemes]
    assert sweeps.families(entries, one.sweep) == {
        f"kvstream, margin={margin}": [
            (f"kvstream(target={target},margin={margin})", f"target={target}") for target in ("0.5", "0.9")
        ]
        for margin in ("0", "0.1")
    }
    assert sweeps.families(entries, ()) == {}
    turns = made("depth=1,2", schemes=[{"policy": "mpc", "codec": "kvstream", "label": "planner"}])
    entries = [asdict(scheme) | {"name": scheme.name} for scheme in turns.schemes]
    assert sweeps.families(entries, turns.sweep) == {
        "planner": [("planner(depth=1)", "depth=1"), ("planner(depth=2)", "depth=2")]
    }


@given(st.text(max_size=40))
def test_any_text_is_a_sweep_or_one_line(text: str) -> None:
    try:
        sweep = sweeps.parse(text)
    except SpecError:
        return
    assert sweep.values
    assert sweep.setting in text
