from __future__ import annotations

import pytest

from testbed import experiment
from testbed.errors import SpecError

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
        ({"limits": {"median_eror": 0.1}}, "limits has no setting 'median_eror'; it has window_s, median_error"),
        ({"limits": {"gap_s": -1}}, "at least 0"),
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
        ({"most_invalid": 2}, "most_invalid is 2; give a share"),
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
