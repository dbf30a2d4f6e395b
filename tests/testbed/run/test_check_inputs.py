"""What an experiment names must be there before anything runs, and be the same when a run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvstream.codec.errors import CodecError
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config import experiment
from kvstream.testbed.errors import SpecError
from kvstream.testbed.run import check_inputs
from kvstream.traces.errors import TraceError

BASE: Mapping[str, Any] = {
    "name": "e",
    "contexts": ["docs"],
    "traces": ["steady"],
    "deadlines_s": [1.0],
    "schemes": [{"policy": "buffer-based", "codec": "kvstream"}],
}
QUESTION = ("line red-fox: REGISTER is <", "12345")


def scheme(policy: str, codec: str = "kvstream") -> dict[str, Any]:
    return {"schemes": [{"policy": policy, "codec": codec}]}


def context_file(folder: Path, name: str = "my-book") -> Path:
    text = f"Once upon a time.\n{QUESTION[0]}{QUESTION[1]}>\nThe end.\n" + "More of it.\n" * 8
    file = folder / "book.json"
    file.write_text(json.dumps({"name": name, "text": text, "questions": [QUESTION]}))
    return file


def test_a_sound_experiment_passes() -> None:
    check_inputs.check(experiment.from_dict(BASE))
    check_inputs.check(experiment.load(experiment.MAIN_JOB))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"traces": ["nowhere.csv"]}, TraceError, "nowhere"),
        ({"links": ["foo=1"]}, SpecError, "unknown setting 'foo'"),
        ({"links": ["loss=200%"]}, SpecError, "loss"),
        ({"links": ["up_trace=nowhere"]}, TraceError, "nowhere"),
        ({"device": "tpu"}, SpecError, "device 'tpu': use cpu, cuda"),
        ({"contexts": ["dosc"]}, SpecError, "unknown context 'dosc'"),
        (scheme("nobody"), PolicyError, "nobody"),
        (scheme("fixed,level=99"), PolicyError, "policy fixed,level=99: level 99 is out of range; give 0 to"),
        (scheme("fixed,level=abc"), PolicyError, "unknown level 'abc'; choose lowest"),
        (scheme("cachegen", "zip"), CodecError, "unknown codec 'zip'; choose from"),
        ({"workload": "mistral-7b", "contexts": ["9k"]}, SpecError, "9k"),
    ],
)
def test_what_is_not_there_is_named(change: Mapping[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_inputs.check(experiment.from_dict(BASE | change))


def test_a_constructor_that_raises_is_said_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class P:\n  def __init__(self): raise OSError('no such luck')\n  def choose(self, obs): ...\n")
    with pytest.raises(PolicyError, match="cannot be built: OSError: no such luck"):
        check_inputs.check(experiment.from_dict(BASE | scheme(f"{file}:P")))


def test_files_of_policies_and_contexts_have_hashes(tmp_path: Path) -> None:
    policy, context = tmp_path / "mine.py", context_file(tmp_path)
    policy.write_text("class P:\n  gain: float = 1.0\n  def choose(self, obs): ...\n")
    named = experiment.from_dict(BASE | scheme(f"{policy}:P") | {"contexts": ["docs", str(context)]})
    digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in (policy, context)}
    assert check_inputs.files(named) == digests
    assert check_inputs.files(experiment.from_dict(BASE)) == {}


def test_a_context_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match=r"x\.json: not a context"):
        check_inputs.check(experiment.from_dict(BASE | {"contexts": [str(tmp_path / "x.json")]}))


def test_a_context_of_one_s_own_is_found_by_its_path(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstream.testbed.encoding import calibrate, prepare

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "distortions", lambda model, codec, *_: [0.0] * len(codec.levels))
    file = str(context_file(tmp_path))
    prepared = prepare.prepare(str(tiny_folder), [file], ["raw"], 64)
    assert list(prepared.manifests) == list(prepared.ids) == [(file, "raw")]
    assert prepared.ids[file, "raw"].startswith("my-book-raw-")
    assert list(prepared.exact_right) == [file]


def test_a_path_makes_a_readable_unit() -> None:
    [unit] = experiment.from_dict(BASE | {"contexts": ["../books/my book.json"]}).units()
    assert unit.unit_id.startswith("000-my-book-")
    [unit] = experiment.from_dict(BASE).units()
    assert unit.unit_id.startswith("000-docs-")
