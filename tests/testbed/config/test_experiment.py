from __future__ import annotations

import dataclasses
import math

import pytest

from kvstream.codec.errors import CodecError
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config import experiment
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_toml
from kvstream.traces.errors import TraceError

BASE = {
    "name": "e",
    "contexts": ["a", "b"],
    "traces": ["steady", "step"],
    "deadlines_s": [1.0],
    "schemes": [{"policy": "cachegen", "codec": "raw"}, {"policy": "cachegen", "codec": "raw", "depth": 1}],
}


def test_units_are_the_product_of_the_settings():
    units = experiment.from_dict(BASE | {"repetitions": 3}).units()
    assert len(units) == 2 * 2 * 3
    assert len({unit.unit_id for unit in units}) == len(units)
    assert {unit.seed for unit in units} == {1, 2, 3}


def test_every_unit_runs_all_schemes_in_an_order_of_its_own():
    many = experiment.from_dict(BASE | {"contexts": [f"c{i}" for i in range(20)]})
    orders = [tuple(scheme.name for scheme in many.order(unit)) for unit in many.units()]
    assert all(sorted(order) == ["cachegen", "cachegen-depth1"] for order in orders)
    assert len(set(orders)) == 2
    assert orders == [tuple(scheme.name for scheme in many.order(unit)) for unit in many.units()]


def test_a_plus_in_a_policy_s_name_stays_in_the_scheme_s():
    schemes = [{"policy": "cachegen+compute,margin=0.1", "codec": "raw"}]
    (scheme,) = experiment.from_dict(BASE | {"schemes": schemes, "baseline": "cachegen+compute(margin=0.1)"}).schemes
    assert scheme.name == "cachegen+compute(margin=0.1)"
    assert experiment.Scheme("cachegen+compute", "raw", depth=1).name == "cachegen+compute-depth1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"deadlines_s": [0]}, "above 0"),
        ({"deadlines_s": [-1.0]}, "above 0"),
        ({"traces": []}, "traces"),
        ({"schemes": [{"policy": "cachegen"}]}, "codec"),
        ({"schemes": [{"policy": "a", "codec": "raw"}] * 2}, "two schemes"),
        ({"schemes": [{"policy": "a", "codec": "raw", "deph": 1}]}, "depth"),
        ({"schemes": [{"policy": "a", "codec": "raw", "depth": 3}]}, "depth"),
        ({"sede": 3}, "seed"),
        ({"name": "../x"}, "name"),
        ({"baseline": "x"}, "baseline"),
        ({"offsets_s": [-1]}, "offset"),
        ({"limits": {"median_eror": 0.1}}, "unknown limit 'median_eror'; did you mean median_error"),
        ({"limits": {"gap_s": -1}}, "0 or more"),
        ({"limits": {"starved": "0.1"}}, "give a table of numbers"),
        ({"limits": {"gap_s": True}}, "give a table of numbers"),
        ({"limits": {"gap_s": float("nan")}}, "give a table of numbers"),
        ({"limits": 0.1}, "give a table of numbers"),
        ({"contexts": [1]}, "contexts is .1.; give a list of texts"),
        ({"contexts": "docs"}, "contexts is 'docs'; give a list of texts"),
        ({"repetitions": "x"}, "repetitions is 'x'; give a whole number"),
        ({"repetitions": True}, "repetitions is True; give a whole number"),
        ({"offsets_s": 1}, "offsets_s is 1; give a list of numbers"),
        ({"offsets_s": []}, "offsets_s is empty"),
        ({"deadlines_s": ["1s"]}, "give a list of numbers"),
        ({"name": 5}, "name is 5; give a text"),
        ({"schemes": "cachegen"}, "schemes is 'cachegen'; give a list"),
        ({"schemes": ["cachegen"]}, "is not a table"),
        ({"schemes": [{"policy": 3, "codec": "raw"}]}, "scheme 3: policy is 3; give a text"),
        ({"schemes": [{"policy": "a", "codec": "raw", "overlap": "no"}]}, "overlap is 'no'; give true or false"),
        ({"max_invalid": 2}, "max_invalid is 2; give a fraction"),
    ],
)
def test_a_wrong_experiment_gets_one_line(change, says):
    with pytest.raises(SpecError, match=says) as caught:
        experiment.from_dict(BASE | change)
    assert "\n" not in str(caught.value)


def test_limits_that_differ_are_kept():
    limits = {"starved": 10, "gap_s": 0.5}
    assert experiment.from_dict(BASE | {"limits": limits}).limits == limits


def test_a_file_that_is_no_toml_is_named(tmp_path):
    file = tmp_path / "x.toml"
    file.write_bytes(b"\xff\xfe[")
    with pytest.raises(SpecError, match=r"x\.toml"):
        experiment.load(file)
    with pytest.raises(SpecError, match="no such"):
        experiment.load(tmp_path / "missing.toml")


def test_the_main_job_loads():
    main = experiment.load(experiment.MAIN_JOB)
    assert len(main.contexts) >= 3
    assert len(main.traces) >= 3
    assert len(main.units()) >= 24
    assert len(main.deadlines_s) >= 3
    assert not any(trace.startswith(("constant", "steady")) for trace in main.traces)
    compared = [scheme.name for scheme in main.schemes if not scheme.reference]
    assert compared == ["cachegen", "cachegen+compute", "buffer-based", "kvstream", "oracle", "fixed-lowest"]
    assert main.simulated_repetitions * len(main.units()) >= 1000


def test_a_unit_has_one_context_in_turn_and_each_deadline_has_all():
    made = experiment.from_dict(
        BASE | {"contexts": ["a", "b", "c"], "traces": ["wifi", "lte-walk", "step-down-up"], "deadlines_s": [1, 2, 3]}
        | {"contexts_in_turn": True, "repetitions": 2}
    )  # fmt: skip
    units = made.units()
    assert len(units) == 3 * 3 * 2
    for deadline_s in made.deadlines_s:
        assert {unit.context for unit in units if unit.deadline_s == deadline_s} == {"a", "b", "c"}
    for trace in made.traces:
        assert {unit.context for unit in units if unit.trace == trace} == {"a", "b", "c"}


def test_starts_are_drawn_for_each_trace_and_repetition_and_the_same_for_all_deadlines():
    traces = ["lte-walk", "lognormal,median=9Mbps,length=20s,seed={seed}"]
    given = BASE | {"traces": traces, "offsets": "random", "deadlines_s": [1.0, 2.0], "repetitions": 3}
    made = experiment.from_dict(given)
    starts = {}
    for unit in made.units():
        assert unit.offset_s >= 0.0
        assert starts.setdefault((unit.trace, unit.seed), unit.offset_s) == unit.offset_s
    assert len(set(starts.values())) == len(starts) == 6
    assert made.units() == made.units()
    other = experiment.from_dict(given | {"seed": 2})
    assert other.units()[0].offset_s != made.units()[0].offset_s


REFERENCE = {"policy": "text", "codec": "raw", "reference": True}


def test_reference_lines_run_on_a_few_units_spread_over_the_experiment():
    made = experiment.from_dict(BASE | {"repetitions": 5, "schemes": [*BASE["schemes"], REFERENCE]})
    on = sorted(unit.index for unit, scheme in made.sessions() if scheme.reference)
    assert on == [3, 10, 16]
    assert len(made.sessions()) == 20 * 2 + 3
    assert made.size == "20 units x 2 schemes, 1 reference line on 3"
    plain = experiment.from_dict(BASE | {"repetitions": 5})
    for with_line, without in zip(made.units(), plain.units(), strict=True):
        assert len(made.order(with_line)) == len(plain.order(without)) + (with_line.index in on)


def test_the_simulated_part_has_more_repetitions_and_no_reference_lines():
    given = BASE | {"simulated_repetitions": 7, "schemes": [*BASE["schemes"], REFERENCE]}
    beside = experiment.from_dict(given).simulated()
    assert (beside.repetitions, beside.simulated_repetitions) == (7, 0)
    assert [scheme.name for scheme in beside.schemes] == ["cachegen", "cachegen-depth1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schemes": [REFERENCE]}, "all schemes are reference lines"),
        ({"schemes": [*BASE["schemes"], REFERENCE], "baseline": "text"}, "not one of the schemes that are compared"),
        ({"simulated_repetitions": -1}, "0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(change, says):
    with pytest.raises(SpecError, match=says):
        experiment.from_dict(BASE | change)


def test_experiments_that_come_with_kvstream_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiment.load("main") == experiment.load(experiment.MAIN_JOB)
    real = experiment.load("smollm2")
    assert real.model == "smollm2"
    assert len(real.units()) >= 24
    compared = [
        [scheme.name for scheme in one.schemes if not scheme.reference] for one in (real, experiment.load("main"))
    ]
    assert compared[0] == compared[1]
    assert real.predicted_s(real.units()) > 1.2 * experiment.load("main").predicted_s(real.units())
    with pytest.raises(SpecError, match="nor one of those that come with kvstream: main and smollm2"):
        experiment.load("smollm3")
    (tmp_path / "main").write_text("x = 1\n")
    with pytest.raises(SpecError, match="main: unknown setting 'x'"):
        experiment.load("main")


# --- names and order


def named(*policies: str, **settings: object) -> list[str]:
    schemes = [{"policy": policy, "codec": "raw"} | settings for policy in policies]
    return [scheme.name for scheme in experiment.from_dict(BASE | {"schemes": schemes}).schemes]


def test_a_scheme_is_named_after_its_policy_and_settings():
    assert named("./deep/mine.py:MyPolicy,safety=0.6", "mpc,horizon=5", "lowest") == [
        "MyPolicy(safety=0.6)",
        "mpc(horizon=5)",
        "lowest",
    ]
    assert named("mpc,file=./x y.csv", depth=1) == ["mpc(file=.-xy.csv)-depth1"]


def test_schemes_of_one_name_are_told_apart_by_file_and_codec():
    assert named("./a.py:P", "b.py:P,k=1", "lib/b.py:P") == ["a.P", "P(k=1)", "b.P"]
    schemes = [{"policy": "mpc", "codec": codec} for codec in ("raw", "cachegen,coder=ac")]
    made = experiment.from_dict(BASE | {"schemes": schemes})
    assert [scheme.name for scheme in made.schemes] == ["mpc-raw", "mpc-cachegen(coder=ac)"]
    with pytest.raises(SpecError, match="two schemes are named 'mpc'"):
        named("mpc", "mpc")


def test_any_beginning_of_a_run_is_spread_over_traces_deadlines_and_links():
    made = experiment.from_dict(
        BASE | {"traces": ["steady", "wifi", "lte-walk"], "links": ["", "delay=20ms"], "deadlines_s": [1, 2, 3, 4]}
    )
    order = [unit for unit, scheme in made.sessions() if scheme.name == "cachegen"]
    assert sorted(unit.index for unit in order) == list(range(48))
    for count in (6, 12, 24):
        seen = [(unit.trace, unit.link) for unit in order[:count]]
        assert {seen.count(pile) for pile in seen} == {count // 6}
        assert len(set(seen)) == 6
    assert len({unit.deadline_s for unit in order[:12]}) > 2
    assert [unit.index for unit in order] != sorted(unit.index for unit in order)


# --- the file to start from


def test_the_file_to_start_from_and_each_line_in_it_can_be_used(tmp_path):
    template = experiment.MAIN_JOB.with_name("experiment.toml.template").read_text(encoding="utf-8")
    file = tmp_path / "mine.toml"
    file.write_text(template)
    made = experiment.load(file)
    assert made.name == "mine"
    assert len(made.schemes) == 2
    commented = [line for line in template.splitlines() if line.startswith("# ") and " = " in line]
    assert len(commented) > 20
    for line in commented:
        file.write_text(template.replace(line, line.removeprefix("# ")))
        changed = experiment.load(file)
        assert changed != made, f"{line} changes nothing"


def test_the_schema_takes_what_we_take_and_refuses_what_we_refuse():
    import json

    jsonschema = pytest.importorskip("jsonschema", reason="the extra [dev] is not installed")
    path = experiment.MAIN_JOB.with_name("experiment.schema.json")
    schema = json.loads(path.read_text(encoding="utf-8"))
    check = jsonschema.Draft202012Validator(schema)
    shipped = [file.read_bytes() for file in sorted(path.parent.glob("*.toml"))]
    assert len(shipped) > 1
    for data in shipped:
        check.validate(parse_toml(data, "shipped"))
    for change in ({"sede": 3}, {"traces": []}, {"repetitions": "x"}, {"target": 2}, {"schemes": [{"policy": "a"}]}):
        assert not check.is_valid(BASE | change), change
        with pytest.raises(SpecError):
            experiment.from_dict(BASE | change)


ODD = "é\u202e" * 800
"""Characters that cannot be printed: each is shown as six."""


@pytest.mark.parametrize("value", [ODD, [ODD], {ODD: ODD}, 10**400, [10**400], [[[]]] * 500, math.nan, "x\ny"])
def test_whatever_stands_in_a_file_is_refused_in_a_short_line(value):
    scheme = {"policy": "kvstream", "codec": "kvstream"}
    whole = {"name": "x", "contexts": ["docs"], "traces": ["lte-walk"], "deadlines_s": [1.0], "schemes": [scheme]}
    fields = [field.name for field in dataclasses.fields(experiment.Experiment)]
    tried = [whole | {name: value} for name in [*fields, ODD]]
    tried += [whole | {"schemes": [scheme | {name: value}]} for name in ("policy", "codec", "label", "depth", ODD)]
    said = []
    for given in tried:
        try:
            experiment.from_dict(given)
        except (SpecError, PolicyError, CodecError, TraceError) as error:
            said.append(str(error))
    assert len(said) > 20
    assert all(len(message) < 2000 and "\n" not in message for message in said)
