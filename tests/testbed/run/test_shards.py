"""Shards and processes of a run: the same rows as in one go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.testbed.cli import main
from kvstream.testbed.config import experiment
from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.results.folder import Run
from kvstream.testbed.results.merge import merge
from kvstream.testbed.run import jobs, shards
from kvstream.testbed.run.shards import WHOLE, Shard
from kvstream.testbed.run.simulated import run_simulated

SPEC = """
contexts = ["docs", "code"]
traces = ["steady,scale_mean=60Mbps", "wifi,scale_mean=60Mbps"]
deadlines_s = [0.6, 0.8]
[[schemes]]
policy = "throughput"
codec = "uniform"
[[schemes]]
policy = "fixed,level=lowest"
codec = "uniform"
"""
FILES = ("sessions.jsonl", "chunks.jsonl")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "x.toml"
    file.write_text(SPEC)
    return file


@pytest.fixture(scope="module")
def made(spec: Path) -> Experiment:
    return experiment.load(spec)


@pytest.fixture(scope="module")
def whole(made: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in one go."""
    return ran(made, tmp_path_factory.mktemp("whole"))


def ran(made: Experiment, folder: Path, shard: Shard = WHOLE, processes: int = 1) -> Run:
    run = Run(folder)
    run_simulated(made, run, quiet=True, shard=shard, jobs=processes)
    run.rebuild()
    return run


def same(one: Run, other: Run) -> bool:
    return all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in FILES)


@given(st.integers(1, 40), st.integers(0, 200))
def test_every_unit_is_in_one_shard(count: int, index: int) -> None:
    unit = experiment.Unit(index, "docs", "steady", 0.0, 1.0, "", 1)
    assert sum(Shard(number, count).has(unit) for number in range(1, count + 1)) == 1


@pytest.mark.parametrize("text", ["", "3", "1/", "0/4", "5/4", "1/0", "a/b", "-1/4", "1/4/2"])
def test_malformed_shards_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="--shard"):
        shards.parse(text)


def test_shards_in_one_folder_give_the_run_in_one_go(made: Experiment, whole: Run, tmp_path: Path) -> None:
    for number, left in ((3, 12), (1, 6), (2, 0)):
        run = ran(made, tmp_path, Shard(number, 3))
        assert shards.left(made, run) == left
    assert same(whole, run)


def test_shards_in_folders_of_their_own_are_joined(made: Experiment, whole: Run, tmp_path: Path) -> None:
    parts = [ran(made, tmp_path / str(number), Shard(number, 2)) for number in (1, 2)]
    joined = merge(parts, tmp_path / "joined")
    joined.rebuild()
    assert same(whole, joined)
    assert len(joined.manifest["shards"]) == 2
    assert joined.manifest["shards"][0]["command"]
    with pytest.raises(SpecError, match="joined exists; choose another folder"):
        merge(parts, tmp_path / "joined")
    twice = merge([whole, *parts, parts[0]], tmp_path / "twice")
    twice.rebuild()
    assert same(whole, twice)


def test_only_shards_of_one_run_are_joined(made: Experiment, whole: Run, tmp_path: Path) -> None:
    other = ran(experiment.replace(made, deadlines_s=(0.9,), contexts=("docs",)), tmp_path / "other")
    with pytest.raises(SpecError, match="differ in experiment: they are no shards of one run"):
        merge([whole, other], tmp_path / "joined")
    part = ran(made, tmp_path / "part", Shard(1, 4))
    cell = next(part.cells.glob("*.json"))
    cell.write_text(cell.read_text().replace('"wasted_bytes": 0', '"wasted_bytes": 1'))
    with pytest.raises(SpecError, match=r"another run has a session of .* with another result"):
        merge([whole, part], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_session_that_failed_in_one_shard_and_not_in_another_is_done(whole: Run, tmp_path: Path) -> None:
    """As when a machine was lost and its shard run again elsewhere."""
    rows = whole.rows()
    failed = Run(tmp_path / "failed")
    failed.create(whole.manifest)
    cell = {"row": rows[0] | {"status": "failed"}, "chunks": [], "link": []}
    (failed.cells / f"{rows[0]['unit_id']}-{rows[0]['scheme']}.failure.json").write_text(json.dumps(cell))
    for number, sources in enumerate(([failed, whole], [whole, failed])):
        joined = merge(sources, tmp_path / str(number))
        joined.rebuild()
        assert same(whole, joined)


def test_the_commands(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        runs = str(tmp_path / str(number))
        assert main(["simulate", str(spec), "--runs", runs, "--shard", f"{number}/2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["left"] == 8
    parts, joined = [str(tmp_path / number / "x") for number in "12"], tmp_path / "all" / "joined"
    assert main(["merge", *parts]) == 2
    assert "--into" in capsys.readouterr().err
    assert main(["merge", *parts, "--into", str(joined), "--fail-if", "throughput.bytes>1B", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["units"]["counted"] == 8
    assert "threshold violated" in said.err
    assert (joined / "report.html").is_file()


def test_shards_at_once_in_one_folder(spec: Path, whole: Run, tmp_path: Path) -> None:
    """As xargs starts them; the last one to end writes the report."""
    kvstream = f"{sys.executable} -m kvstream.testbed.cli"
    line = f"seq 3 | xargs -P 3 -I{{}} {kvstream} simulate {spec} --runs {tmp_path} --shard {{}}/3"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(whole, Run(tmp_path / "x"))
    assert (tmp_path / "x" / "report.html").is_file()


@pytest.mark.parametrize("option", ["--fresh", "--fail-if=throughput.met<1", "--junit=x.xml"])
def test_a_shard_neither_removes_the_others_nor_judges_the_run(
    spec: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", str(spec), "--shard", "1/2", option]) == 2
    assert "kvstream merge" in capsys.readouterr().err


def test_a_dry_run_shows_the_units_of_a_shard(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(spec), "--shard", "2/3", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [unit["index"] for unit in planned["units"]] == [1, 4, 7]
    assert planned["sessions"] == 6


# --- processes


def test_processes_give_the_rows_of_one(made: Experiment, whole: Run, tmp_path: Path) -> None:
    assert same(whole, ran(made, tmp_path, processes=2))


def test_a_run_that_is_interrupted_in_all_its_processes_can_go_on(tmp_path: Path) -> None:
    file = tmp_path / "many.toml"
    file.write_text(SPEC.replace("[0.6, 0.8]", f"{[0.5 + k / 8000 for k in range(4000)]}"))
    command = ["-m", "kvstream.testbed.cli", "simulate", str(file), "--runs", str(tmp_path), "--jobs", "2", "--json"]
    child = subprocess.Popen(
        [sys.executable, *command], start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    cells = tmp_path / "many" / "cells"
    while child.poll() is None and not any(cells.glob("*.json")):
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)  # as Ctrl-C on a terminal
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert "Finished sessions are kept" in said
    done = len(list(cells.glob("*.json")))
    assert f"Interrupted: {done} of 16000 units so far, on " in said
    assert 0 < done < 16_000
    assert len(Run(tmp_path / "many").rows()) == 2 * done
    end_s = time.monotonic() + 60
    while alive(child.pid) and time.monotonic() < end_s:  # the tracker of multiprocessing ends after all others
        time.sleep(0.1)
    assert not alive(child.pid)


def alive(group: int) -> list[str]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(stat.parent.name)
    return found


def negative(number: int) -> int:
    if number == 13:
        raise SpecError("unlucky")
    if number == 14:
        os._exit(1)
    return -number


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_errors_through(count: int) -> None:
    found = []
    with pytest.raises(SpecError, match="unlucky"):
        found.extend(jobs.results(negative, range(20), count))
    assert found == [-number for number in range(13)]


def test_a_process_that_ends_is_one_line() -> None:
    with pytest.raises(MachineError, match=r"one of 2 processes ended.*fewer --jobs"):
        list(jobs.results(negative, [1, 2, 14, 3], 2))
