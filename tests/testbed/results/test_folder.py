from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.folder import Row, Run, load, write_csv, write_whole


def row(unit_id: str = "000-a-1", scheme: str = "cachegen", status: str = "ok") -> Row:
    return Row(
        unit_id=unit_id, scheme=scheme, policy="cachegen", codec="raw", clairvoyant=False, model="m",
        backend="mininet", context="a", trace="steady", offset_s=0.0, link="", seed=1, depth=2, overlap=True,
        status=status, why="", deadline_s=1.0, ttft_s=0.5, met=True, distortion=0.0, measured_kl=0.0,
        answer_ok=True, answers_right=1, answers=1, levels=[0], bytes=1, wasted_bytes=0, policy_faults=0,
        oracle_distortion=0.0, oracle_levels=[0], regret=0.0, fidelity={"ok": True}, repeats=0,
    )  # fmt: skip


def manifest(name: str = "e") -> dict:
    return {"experiment": {"name": name}, "backend": "mininet", "schemes": [{"name": "cachegen"}, {"name": "fixed"}]}


def test_files_are_rebuilt_from_cells(tmp_path):
    run = Run(tmp_path / "r")
    run.create(manifest())
    run.save(row(), [{"chunk": 0, "level": 0}], [{"t_s": 0.0, "delivered_bytes": 0}])
    run.save(row(scheme="fixed"), [{"chunk": 0, "level": 1}], [])
    rows = run.rebuild()
    assert [r["scheme"] for r in rows] == ["cachegen", "fixed"]
    chunks = [json.loads(line) for line in (run.path / "chunks.jsonl").read_text().splitlines()]
    assert chunks[0] == {"unit_id": "000-a-1", "scheme": "cachegen", "chunk": 0, "level": 0}
    assert list(load(run.path)["scheme"]) == ["cachegen", "fixed"]


def test_a_failed_cell_is_retried_and_replaced(tmp_path):
    run = Run(tmp_path / "r")
    run.create(manifest())
    run.save(row(status="failed"), [], [])
    assert not run.has("000-a-1", "cachegen")
    assert [r["status"] for r in run.rows()] == ["failed"]
    run.save(row(), [], [])
    assert run.has("000-a-1", "cachegen")
    assert [r["status"] for r in run.rows()] == ["ok"]


def test_a_folder_with_another_experiment_is_refused(tmp_path):
    run = Run(tmp_path / "r")
    run.create(manifest())
    run.create(manifest())
    with pytest.raises(SpecError, match="another experiment"):
        run.create(manifest("f"))


def test_a_run_from_before_a_setting_existed_is_resumed_with_its_default(tmp_path):
    run = Run(tmp_path / "r")
    run.create(manifest())
    now = manifest()
    now["experiment"] |= {"target": 0.95}
    run.create(now)
    now["experiment"] |= {"target": 0.9}
    with pytest.raises(SpecError, match="another experiment"):
        run.create(now)


@pytest.mark.parametrize(
    ("key", "words"),
    [("traces", "a trace"), ("files", "file of a policy"), ("profiles", "profile"), ("model", "model")],
)
def test_a_run_whose_inputs_changed_is_not_resumed(tmp_path, key, words):
    run = Run(tmp_path / "r")
    run.create(manifest() | {key: {"x": "1"}})
    run.create(manifest() | {key: {"x": "1"}, "git": "another commit"})
    with pytest.raises(SpecError, match=f"{words}.* has changed since; start over with --fresh"):
        run.create(manifest() | {key: {"x": "2"}})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ("[]", "not a JSON object"),
        ("{}", "experiment is missing"),
        ('{"experiment": 1, "backend": "b", "schemes": []}', "experiment is 1; give a table"),
        ('{"experiment": {"name": "e"}, "backend": "b", "schemes": [1]}', "not a JSON object"),
        ('{"experiment": {"name": "e"}, "backend": "b", "schemes": [], "levels": 1}', "levels is 1; give a table"),
        (
            '{"experiment": {"name": "e", "deadlines_s": 3}, "backend": "b", "schemes": []}',
            "deadlines_s is 3; give",
        ),
    ],
)
def test_a_damaged_manifest_is_reported_in_one_line(tmp_path, content, why):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SpecError, match=rf"manifest\.json is damaged \({why}.*; run it again with --fresh") as caught:
        _ = Run.open(tmp_path).manifest
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"row": {"met": "yes"}}, {"row": {"distortion": "x"}}, {"row": {"fidelity": None}}, {"row": {"status": "fine"}},
     {"chunks": [1]}],
)  # fmt: skip
def test_a_cell_with_a_value_of_another_type_is_damaged(tmp_path, change):
    run = Run(tmp_path / "r")
    run.create(manifest())
    run.save(row(), [], [])
    [cell] = run.cells.iterdir()
    body = json.loads(cell.read_text())
    cell.write_text(json.dumps(body | change | {"row": body["row"] | change.get("row", {})}))
    with pytest.raises(SpecError, match=r"is damaged \(.*; give "):
        run.rows()


@pytest.mark.parametrize("content", ["", "\x00", "[]", "{}", '{"row": {}, "chunks": [], "link": []}', '{"cells": [1]}'])
def test_a_damaged_cell_is_reported_with_the_fix(tmp_path, content):
    run = Run(tmp_path / "r")
    run.create(manifest())
    run.save(row(), [], [])
    [cell] = run.cells.iterdir()
    cell.write_text(content)
    with pytest.raises(SpecError, match=rf"{cell.name} is damaged \(.*; remove it, and the next run"):
        run.rows()


def test_reading_a_run_writes_nothing(tmp_path):
    run = Run(tmp_path / "r")
    run.create(manifest())
    run.save(row(), [], [])
    before = {file.name for file in run.path.iterdir()}
    assert len(load(run.path, every=True)) == 1
    assert {file.name for file in run.path.iterdir()} == before == {"manifest.json", "cells"}


def test_a_csv_has_plain_cells(tmp_path):
    fidelity = {"ok": True, "reasons": ["a, b"], "deep": {"x": 1.5}}
    judged = replace(row(), levels=[3, "text"], fidelity=fidelity, regret=None)
    write_csv([vars(judged), vars(row(scheme="fixed"))], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["levels"], first["fidelity.ok"], first["fidelity.deep.x"]) == ('[3, "text"]', "True", "1.5")
    assert first["fidelity.reasons"] == '["a, b"]'
    assert first["regret"] == second["fidelity.deep.x"] == ""
    assert "fidelity" not in first


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SpecError, match="not a run"):
        Run.open(tmp_path)


def test_infinity_becomes_null(tmp_path):
    write_whole(tmp_path / "x.json", {"a": float("inf"), "b": [float("nan")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None]}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
