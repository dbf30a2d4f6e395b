"""Synthetic workloads: the paper's sizes come out, compute profiles behave, and a simulated run of one is labelled."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kvstream.testbed.config import experiment
from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import by_setting
from kvstream.testbed.results.folder import Run
from kvstream.testbed.run import check_inputs
from kvstream.testbed.run.simulated import run_simulated
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.workloads import synthetic

SPEC = {
    "name": "paper",
    "workload": "mistral-7b,prompt=0",
    "contexts": ["longchat"],
    "chunk_tokens": 1500,
    "traces": ["paper-uniform,chunks=8,seed={seed}"],
    "deadlines_s": [0.5, 1.0],
    "repetitions": 40,
    "schemes": [
        {"policy": "fixed,level=highest", "codec": "uniform", "depth": 1, "label": "8-bit"},
        {"policy": "cachegen", "codec": "cachegen", "depth": 1, "label": "cachegen"},
        {"policy": "oracle,margin=0", "codec": "cachegen", "depth": 1, "label": "oracle"},
    ],
}


def test_sizes_are_those_of_the_paper():
    workload = synthetic.parse("mistral-7b")
    assert workload.kv.elements_per_token == 65_536
    eight_bit = workload.manifest("longchat", "uniform", 1500)
    assert sum(chunk.sizes_bytes[-1] for chunk in eight_bit.chunks) == pytest.approx(622e6, rel=0.005)
    coded = workload.manifest("longchat", "cachegen", 1500)
    default = [level.name for level in coded.levels].index("bins x1")
    assert sum(chunk.sizes_bytes[default] for chunk in coded.chunks) == pytest.approx(176e6, rel=0.005)
    fp16_80k = 80_000 * 2 * synthetic.parse("llama-34b").kv.elements_per_token
    assert fp16_80k == pytest.approx(19e9, rel=0.05)


@pytest.mark.parametrize("name", ["mistral-7b", "llama-34b", "llama-70b", "mistral-7b,compute=h200"])
@pytest.mark.parametrize("codec", ["uniform", "cachegen", "kvstream"])
def test_a_workload_is_a_whole_offer(name, codec):
    workload = synthetic.parse(name)
    manifest = workload.manifest("longchat", codec, 1500)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    costs = workload.costs(manifest)
    assert len(manifest.chunks) == len(costs.decode_s) == 7
    assert manifest.tokens == 9490
    for chunk in manifest.chunks:
        assert list(chunk.sizes_bytes) == sorted(chunk.sizes_bytes)
    levels = manifest.levels
    assert [x.distortion for x in levels] == sorted((x.distortion for x in levels), reverse=True)
    assert costs.recompute_s is not None
    full = [seconds for seconds, chunk in zip(costs.recompute_s, manifest.chunks, strict=True) if chunk.tokens == 1500]
    assert full == sorted(full), "attention makes later chunks dearer"
    assert all(0 < seconds < 0.1 for row in costs.decode_s for seconds in row)
    assert costs.prefill_s > 0


def test_profiles_rank_machines_and_fit_the_public_code():
    a40, h200 = synthetic.parse("mistral-7b,compute=a40"), synthetic.parse("mistral-7b,compute=h200")
    assert a40.forward_s(0, 1000) == pytest.approx(0.2, rel=0.05)
    assert h200.forward_s(0, 1500) < a40.forward_s(0, 1500) / 5
    assert synthetic.parse("llama-70b").gpus > synthetic.parse("llama-70b,compute=h200").gpus
    assert synthetic.decode_bytes_per_s("cachegen", "a40") < synthetic.decode_bytes_per_s("cachegen", "h200")
    # one token reads all weights: no machine is faster than its memory
    assert a40.forward_s(9490, 9491) >= 2 * a40.parameters / 696e9


def test_without_a_prompt_the_deadline_is_on_the_cache():
    workload = synthetic.parse("mistral-7b,prompt=0")
    assert workload.costs(workload.manifest("longchat", "cachegen", 1500)).prefill_s == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"workload": "mistral"}, "mistral-7b"),
        ({"workload": "mistral-7b,compute=b100"}, "a40"),
        ({"workload": "mistral-7b,gpu=a40"}, "compute"),
        ({"workload": "mistral-7b,prompt=-1"}, "prompt"),
        ({"contexts": ["docs"]}, "longchat"),
        ({"contexts": ["0"]}, "longchat"),
        ({"schemes": [{"policy": "cachegen", "codec": "raw"}]}, "uniform"),
    ],
)
def test_what_a_workload_does_not_have_is_named(change, says):
    with pytest.raises(SpecError, match=says) as caught:
        check_inputs.check(experiment.from_dict(SPEC | change))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    run = Run(tmp_path_factory.mktemp("run") / "paper")
    chosen = experiment.from_dict(SPEC)
    run_simulated(chosen, run, quiet=True)
    return SimpleNamespace(run=run, experiment=chosen, rows=run.rebuild())


def test_a_run_of_a_workload_says_that_it_is_synthetic(paper):
    assert len(paper.rows) == 2 * 40 * 3
    assert {row["model"] for row in paper.rows} == {"synthetic mistral-7b on 1 a40"}
    facts = paper.run.manifest["workload"]
    assert facts["synthetic"] is True
    assert facts["kb_per_token"]["cachegen"]["bins x1"] == pytest.approx(18.5, abs=0.1)
    assert facts["recompute_s"]["all"] > 1
    assert "SYNTHETIC" in synthetic.text(facts)


def test_every_repetition_has_a_link_of_its_own_and_every_scheme_the_same(paper):
    traces = {}
    for row in paper.rows:
        traces.setdefault((row["deadline_s"], row["seed"]), set()).add(row["trace"])
    assert all(len(found) == 1 for found in traces.values())
    assert len({row["trace"] for row in paper.rows}) == 40
    assert len(paper.run.manifest["traces"]) == 40


def test_the_paper_s_trace_model_in_small(paper):
    entries = by_setting.by_setting(paper.rows, ["8-bit", "cachegen", "oracle"])
    assert [(entry["deadline_s"], entry["n"]) for entry in entries] == [(0.5, 40), (1.0, 40)]
    at = {entry["deadline_s"]: entry["schemes"] for entry in entries}
    assert at[0.5]["8-bit"]["violations"] == 1.0
    assert at[1.0]["8-bit"]["violations"] > 0.7
    assert at[1.0]["cachegen"]["violations"] < at[1.0]["8-bit"]["violations"] / 2
    for schemes in at.values():
        assert schemes["oracle"]["violations"] <= schemes["cachegen"]["violations"]
    table = by_setting.text(entries)
    assert "SLO violations" in table
    assert len(table.splitlines()) == 4


def test_settings_leave_out_units_that_are_invalid_for_any_scheme(paper):
    rows = [dict(row) for row in paper.rows]
    first = rows[0]["unit_id"]
    for row in rows:
        if row["unit_id"] == first and row["scheme"] == "8-bit":
            row["status"] = "invalid"
    counts = [entry["n"] for entry in by_setting.by_setting(rows, ["8-bit", "cachegen", "oracle"])]
    assert sorted(counts) == [39, 40]


def test_a_finished_run_is_not_simulated_again_and_a_cut_off_one_goes_on(paper, tmp_path):
    cells = sorted(paper.run.cells.glob("*.json"))
    assert len(cells) == 80, "one file a unit"
    stamp = cells[0].stat().st_mtime_ns
    gone = cells[1].read_text()
    cells[1].unlink()
    run_simulated(paper.experiment, Run(paper.run.path), quiet=True)
    assert cells[0].stat().st_mtime_ns == stamp
    again = {(c["row"]["scheme"], c["row"]["ttft_s"]) for c in json.loads(cells[1].read_text())["cells"]}
    assert again == {(c["row"]["scheme"], c["row"]["ttft_s"]) for c in json.loads(gone)["cells"]}
