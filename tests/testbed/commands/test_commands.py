"""The command line as scripts use it: JSON on standard output, one line on standard error, a meaningful status."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.cli import main
from kvstream.testbed.emulator import sandbox
from kvstream.testbed.receiver import answer
from tests.testbed.made_run import make_run

QUICK = ("simulate", "--quick", "--policy", "buffer-based", "--policy", "fixed,level=lowest", "--name", "r")
FOLDER = Path("runs/r-quick")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error line of a call that exits with status 2 and prints nothing on standard output."""
    try:
        status = main(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    assert (status, said.out) == (2, ""), said
    assert said.err.count("\n") == 1
    return said.err


# --- run and simulate


def test_a_dry_run_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    planned = printed(capsys, *QUICK, "--dry-run", "--json")
    assert (planned["name"], planned["sessions"], planned["predicted_s"]) == ("r-quick", 16, None)
    assert [scheme["name"] for scheme in planned["schemes"]] == ["buffer-based", "fixed(level=lowest)"]
    assert len(planned["units"]) == 8
    assert printed(capsys, "run", "--quick", "--dry-run", "--json")["predicted_s"] > 1
    assert main([*QUICK, "--dry-run"]) == 0
    assert "8 units x 2 schemes = 16 sessions, in the simulator" in capsys.readouterr().out
    assert not FOLDER.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--trace", "nowhere"), "unknown trace 'nowhere'"),
        (("--policy", "nobody"), "unknown policy 'nobody'"),
        (("--policy", "fixed,level=99"), "level 99 is out of range"),
        (("--codec", "zip"), "unknown codec 'zip'"),
        (("--link", "foo=1"), "unknown setting 'foo'"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--fail-if", "cachegen.met<1"), "unknown scheme 'cachegen'; choose from buffer-based"),
        (("--junit", "nowhere/limits.xml"), "no folder nowhere"),
        (("--junit", "."), "is a folder"),
    ],
)
@pytest.mark.parametrize("mode", [("--dry-run",), ("--fresh",)])
def test_mistakes_are_reported_before_anything_runs_or_is_removed(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str, mode: tuple[str, ...]
) -> None:
    shutil.copytree(make_run(Path("made"), contexts=("docs",)).path, FOLDER)
    before = sorted(FOLDER.rglob("*"))
    assert says in refused(capsys, *QUICK, *mode, *options)
    assert sorted(FOLDER.rglob("*")) == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("simulat",), "kvstream: unknown command 'simulat'; did you mean simulate?"),
        (("trace", "lst"), "kvstream trace: unknown command 'lst'; did you mean list?"),
        (("simulate", "--polcy", "mpc"), "kvstream simulate: unknown option --polcy; did you mean --policy?"),
        ((*QUICK, "--policy", "cachgen"), "unknown policy 'cachgen'; did you mean cachegen"),
        ((*QUICK, "--codec", "kvsteam"), "unknown codec 'kvsteam'; did you mean kvstream?"),
        ((*QUICK, "--trace", "wify"), "did you mean wifi?"),
        ((*QUICK, "--policy", "fixed,levle=3"), "unknown setting 'levle'; did you mean level?"),
        ((*QUICK, "--fail-if", "bufferbased.met<0.5"), "did you mean buffer-based?"),
        ((*QUICK, "--fail-if", "buffer-based.violatons>0.1"), "did you mean violations?"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_what_was_meant_is_named(capsys: pytest.CaptureFixture[str], call: tuple[str, ...], says: str) -> None:
    assert says in refused(capsys, *call)


def test_a_sweep_on_the_command_line_and_in_the_file(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    sweep = ("--sweep", "policy.reservoir=0.1,0.3", "--dry-run", "--json")
    names = ["buffer-based(reservoir=0.1)", "buffer-based(reservoir=0.3)"]
    planned = printed(capsys, *QUICK, *sweep)
    assert [scheme["name"] for scheme in planned["schemes"]] == [*names, "fixed(level=lowest)"]
    (here / "swept.toml").write_text(
        'contexts = ["docs"]\ntraces = ["steady"]\ndeadlines_s = [0.5]\nsweep = ["policy.reservoir=0.1,0.3"]\n'
        '[[schemes]]\npolicy = "buffer-based"\ncodec = "kvstream"\n'
    )
    planned = printed(capsys, "simulate", "swept.toml", "--dry-run", "--json")
    assert [scheme["name"] for scheme in planned["schemes"]] == names
    planned = printed(capsys, "simulate", "swept.toml", "--policy", "mpc", "--dry-run", "--json")
    assert [scheme["name"] for scheme in planned["schemes"]] == ["mpc"], "the file's sweep is of its own schemes"
    said = refused(capsys, *QUICK, "--sweep", "policy.reservor=1,2")
    assert "did you mean reservoir?" in said


def test_a_sweep_has_a_figure_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("seaborn", reason="figures need seaborn, from the extra [run]")
    printed(capsys, *QUICK, "--sweep", "policy.reservoir=0.1,0.3", "--json")
    svg = (FOLDER / "figures" / "sweep.svg").read_text()
    assert "buffer-based by reservoir" in svg
    assert ">0.3<" in svg


def test_another_experiment_in_the_folder_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    one = (*QUICK[:-2], "--name", "r", "--trace", "steady", "--json")
    printed(capsys, *one)
    said = refused(capsys, *one, "--deadline", "2s", "--seed", "3", "--probe")
    assert "holds another experiment: deadlines_s was [0.4], is [2.0]; seed was 1, is 3; also probe; choose" in said
    said = refused(capsys, *one, "--policy", "mpc")
    assert 'schemes was ["buffer-based on kvstream", "fixed,level=lowest on kvstream"], is ["buffer-based on' in said


def test_an_experiment_to_start_from(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert printed(capsys, "init", "--json") == {"file": "experiment.toml", "schema": "experiment.schema.json"}
    planned = printed(capsys, "simulate", "experiment.toml", "--dry-run", "--json")
    assert len(planned["schemes"]) == 2
    json.loads((here / "experiment.schema.json").read_text())
    assert "experiment.toml exists; choose another name" in refused(capsys, "init")
    assert "name it mine.toml" in refused(capsys, "init", "mine.json")


def test_json_stays_json_where_links_cannot_be_emulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "no namespaces")
    assert main(["run", *QUICK[1:], "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["backend"] == "simulator"
    assert "no emulated link here (no namespaces): this is the SIMULATOR" in said.err


def test_a_run_is_not_resumed_with_an_edited_policy(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("mine.py")
    file.write_text("from kvstream import Choice\nclass P:\n  def choose(self, obs):\n    return Choice(0)\n")
    call = ("simulate", "--quick", "--policy", "./mine.py:P", "--name", "r", "--json")
    lowest = printed(capsys, *call)["schemes"][0]["distortion"]
    file.write_text(file.read_text().replace("Choice(0)", "Choice(3)"))
    assert "the file of a policy or a context has changed since; start over with --fresh" in refused(capsys, *call)
    assert printed(capsys, *call, "--fresh")["schemes"][0]["distortion"] < lowest


def test_an_endless_loop_affects_only_its_own_session(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("class P:\n  def choose(self, obs):\n    while True: pass\n")
    run = printed(capsys, *QUICK, "--trace", "steady", "--policy", "./mine.py:P", "--json")
    faults = {entry["scheme"]: entry["policy_faults"] for entry in run["schemes"]}
    assert faults["P"] > 0 == faults["buffer-based"]
    assert all(entry["n"] == 1 for entry in run["schemes"])


@pytest.mark.parametrize(("limit", "status"), [("0.1", 3), ("0.5", 0)])
def test_how_many_units_may_be_invalid_is_a_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, limit: str, status: int
) -> None:
    Path("x.toml").write_text(
        f'contexts = ["docs"]\ntraces = ["steady"]\ndeadlines_s = [1.0]\nmax_invalid = {limit}\n'
        '[[schemes]]\npolicy = "cachegen"\ncodec = "kvstream"\n'
    )
    from kvstream.testbed.results import summary

    said = summary.summarise
    invalid = {"seen": 9, "invalid": 2}
    monkeypatch.setattr(summary, "summarise", lambda *a, **k: (s := said(*a, **k)) | {"units": s["units"] | invalid})
    assert main(["simulate", "x.toml"]) == status
    assert ("2 of 9 units are invalid" in capsys.readouterr().err) == bool(status)


# --- version


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"kvstream {version('kvstream-testbed')}\n")


# --- report


@pytest.fixture
def made(here: Path) -> Path:
    return make_run(here / "made", contexts=("docs",), spoil=False).path


def test_a_report_with_another_baseline(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    summary = printed(capsys, "report", str(made), "--baseline", "text", "--json")
    assert summary["baseline"] == "text"
    assert "vs text" in (made / "report.html").read_text()
    assert "unknown baseline 'x'" in refused(capsys, "report", str(made), "--baseline", "x")


def test_sessions_as_csv(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    assert main(["report", str(made), "--csv", "x.csv"]) == 0
    assert capsys.readouterr().out.endswith("x.csv\n")
    lines = Path("x.csv").read_text().splitlines()
    assert len(lines) == 1 + 28
    assert "fidelity.ok" in lines[0].split(",")
    assert "no folder nope" in refused(capsys, "report", str(made), "--csv", "nope/x.csv")


# --- files of other commands


def test_written_files_are_listed_as_json(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    found = printed(capsys, "policy", "new", "my-policy", "--json")
    assert found == {"file": str(here / "my_policy.py"), "policy": "./my_policy.py:MyPolicy"}
    assert "work/policy.py" in printed(capsys, "lab", "start", "work", "--json")["files"]


# --- paths and addresses


def test_unusable_paths_are_bad_input(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "file").touch()
    assert "is a directory" in refused(capsys, "codec", "inspect", str(here))
    assert "not a directory" in refused(capsys, *QUICK, "--runs", "file/x")
    assert "x.toml" in refused(capsys, "simulate", "file/x.toml")


@pytest.mark.parametrize("port", ["99999", "-3", "http"])
def test_an_invalid_port(capsys: pytest.CaptureFixture[str], made: Path, port: str) -> None:
    assert "is not a port; give 0 to 65535" in refused(capsys, "dashboard", str(made), "--port", port)
    assert "is not a port" in refused(capsys, "serve", "store", "--port", port)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "nice", lambda more: 0)  # the tests after this one go on at full speed
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}: address already in use" in refused(capsys, "dashboard", str(made), "--port", port)


def test_an_unreachable_sender(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(answer, "set_threads", lambda number: None)
    call = ("fetch", "http://127.0.0.1:1", "docs", "--model", str(tiny_folder))
    assert "no sender at http://127.0.0.1:1" in refused(capsys, *call)
