from __future__ import annotations

import json

import pytest

from testbed.errors import SpecError
from testbed.results import Row, Run, load, write_whole


def row(unit_id: str = "000-a-1", scheme: str = "cachegen", status: str = "ok") -> Row:
    return Row(
        unit_id=unit_id, scheme=scheme, policy="cachegen", codec="raw", clairvoyant=False, model="m",
        backend="mininet", context="a", trace="steady", offset_s=0.0, link="", seed=1, depth=2, overlap=True,
        status=status, why="", deadline_s=1.0, ttft_s=0.5, met=True, distortion=0.0, measured_kl=0.0,
        answer_ok=True, answers_right=1, answers=1, levels=[0], bytes=1, wasted_bytes=0, policy_faults=0,
        oracle_distortion=0.0, oracle_levels=[0], regret=0.0, fidelity={"ok": True}, repeats=0,
    )  # fmt: skip


def manifest(name: str = "e") -> dict:
    return {"experiment": {"name": name}, "backend": "mininet"}


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


def test_a_failed_cell_is_tried_again_and_replaced(tmp_path):
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


def test_opening_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SpecError, match="no run"):
        Run.open(tmp_path)


def test_infinity_becomes_null(tmp_path):
    write_whole(tmp_path / "x.json", {"a": float("inf"), "b": [float("nan")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None]}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
