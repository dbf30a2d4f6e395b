"""Two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import compare
from tests.testbed.made_run import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("old", "new"):
        make_run(folder / name, contexts=("docs",), spoil=False)
    return folder / "old", folder / "new"


def test_the_first_scheme_is_the_baseline_unless_the_experiment_names_one(runs: tuple[Path, Path]) -> None:
    old, new = runs
    manifest = json.loads((old / "manifest.json").read_text())
    first = manifest["schemes"][0]["name"]
    for baseline, expected in (("", first), ("fixed-highest", "fixed-highest")):
        manifest["experiment"]["baseline"] = baseline
        (old / "manifest.json").write_text(json.dumps(manifest))
        result = compare.compare(str(old), str(new))
        assert result["baseline"] == f"{expected}@old"
        name = next(one for one in manifest["schemes"] if one["name"] != expected)["name"]
        assert f"{name}@new - {expected}@old" in compare.text(result)


def test_equal_runs_do_not_differ(runs: tuple[Path, Path]) -> None:
    result = compare.compare(*map(str, runs))
    entries = {entry["scheme"]: entry for entry in result["schemes"]}
    base = result["baseline"].removesuffix("@old")
    assert entries[f"{base}@new"]["versus"]["met"] == 0
    assert entries[f"{base}@new"]["versus"]["distortion"] == 0


def test_runs_of_other_units_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", contexts=("code",), spoil=False)
    with pytest.raises(SpecError, match="differ in"):
        compare.compare(str(runs[0]), str(other.path))


def test_runs_over_changed_traces_or_chunks_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", contexts=("docs",), spoil=False).path
    manifest = json.loads((other / "manifest.json").read_text())
    for change, words in (
        ({"traces": {"steady": "another hash"}}, "differ in traces"),
        ({"experiment": manifest["experiment"] | {"chunk_tokens": 17}}, "differ in chunk_tokens"),
        ({"workload": {"prompt": 2000}}, "differ in workload"),
    ):
        (other / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(SpecError, match=words):
            compare.compare(str(runs[0]), str(other))


def test_the_last_line_is_about_one_scheme_before_and_after(runs: tuple[Path, Path]) -> None:
    verdict = compare.compare(*map(str, runs))["verdict"]
    scheme = verdict.partition("@new")[0].split()[-1]
    assert f"{scheme}@new meets the deadline as often as {scheme}@old" in verdict


def test_the_first_lines_are_each_scheme_before_and_after(runs: tuple[Path, Path]) -> None:
    first, second, *_ = compare.text(compare.compare(*map(str, runs))).splitlines()
    assert first == "cachegen: distortion before 0.0065, after 0.0065 nats, paired 0 [0, 0]"
    assert second.startswith("cachegen: SLO violations before 0 %, after 0 %, paired +0.0 points [-")


def test_a_policy_is_paired_with_itself_under_other_settings(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, contexts=("docs",), spoil=False).path for name in ("old", "new")]
    for name, path in zip(("cachegen", "cachegen(reserve_s=1)"), paths, strict=True):
        manifest = json.loads((path / "manifest.json").read_text())
        for scheme in manifest["schemes"]:
            if scheme["name"] == "cachegen":
                scheme |= {"name": name, "policy": "cachegen,reserve_s=1" if "(" in name else "cachegen"}
        (path / "manifest.json").write_text(json.dumps(manifest))
        for cell in (path / "cells").glob("*-cachegen.json"):
            body = json.loads(cell.read_text())
            body["row"]["scheme"] = name
            cell.write_text(json.dumps(body))
    result = compare.compare(*map(str, paths))
    assert result["pairs"]["cachegen(reserve_s=1)@new"]["baseline"] == "cachegen@old"
    assert "cachegen(reserve_s=1) (was cachegen): distortion before 0.0065, after 0.0065" in compare.text(result)
