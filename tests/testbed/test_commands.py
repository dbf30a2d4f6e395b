"""The command line as scripts meet it: JSON on standard output, one line on standard error, a status that means it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from testbed.cli import main
from testbed.emulator import sandbox
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
    """The one line that a call ends with, status 2, nothing on standard output."""
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
    assert (planned["name"], planned["sessions"], planned["predicted_s"]) == ("r-quick", 6, None)
    assert [scheme["name"] for scheme in planned["schemes"]] == ["buffer-based", "fixed-level-lowest"]
    assert len(planned["units"]) == 3
    assert printed(capsys, "run", "--quick", "--dry-run", "--json")["predicted_s"] > 1
    assert main([*QUICK, "--dry-run"]) == 0
    assert "3 units x 2 schemes = 6 sessions, in the simulator" in capsys.readouterr().out
    assert not FOLDER.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--trace", "nowhere"), "no trace 'nowhere'"),
        (("--policy", "nobody"), "no policy is called 'nobody'"),
        (("--policy", "fixed,level=99"), "level 99 does not exist"),
        (("--codec", "zip"), "no codec is called 'zip'"),
        (("--link", "foo=1"), "no setting 'foo'"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--fail-if", "cachegen.met<1"), "there is no scheme 'cachegen'; there are buffer-based"),
        (("--junit", "nowhere/bars.xml"), "there is no folder nowhere"),
        (("--junit", "."), "is a folder"),
    ],
)
@pytest.mark.parametrize("mode", [("--dry-run",), ("--fresh",)])
def test_slips_are_told_before_anything_runs_or_is_removed(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str, mode: tuple[str, ...]
) -> None:
    shutil.copytree(make_run(Path("made"), contexts=("docs",)).path, FOLDER)
    before = sorted(FOLDER.rglob("*"))
    assert says in refused(capsys, *QUICK, *mode, *options)
    assert sorted(FOLDER.rglob("*")) == before


def test_json_stays_json_where_links_cannot_be_emulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "no namespaces")
    assert main(["run", *QUICK[1:], "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["backend"] == "simulator"
    assert "no emulated link here (no namespaces): this is the SIMULATOR" in said.err


def test_a_run_does_not_go_on_with_an_edited_policy(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("mine.py")
    file.write_text("from kvstream import Choice\nclass P:\n  def choose(self, obs):\n    return Choice(0)\n")
    call = ("simulate", "--quick", "--policy", "./mine.py:P", "--name", "r", "--json")
    lowest = printed(capsys, *call)["schemes"][0]["distortion"]
    file.write_text(file.read_text().replace("Choice(0)", "Choice(3)"))
    assert "the file of a policy or a context has changed since; --fresh starts over" in refused(capsys, *call)
    assert printed(capsys, *call, "--fresh")["schemes"][0]["distortion"] < lowest


def test_an_endless_loop_costs_its_own_session(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("class P:\n  def choose(self, obs):\n    while True: pass\n")
    run = printed(capsys, *QUICK, "--trace", "steady", "--policy", "./mine.py:P", "--json")
    faults = {entry["scheme"]: entry["policy_faults"] for entry in run["schemes"]}
    assert faults["mine.py-P"] > 0 == faults["buffer-based"]
    assert all(entry["n"] == 1 for entry in run["schemes"])


@pytest.mark.parametrize(("most", "status"), [("0.1", 3), ("0.5", 0)])
def test_how_many_units_may_be_invalid_is_a_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, most: str, status: int
) -> None:
    Path("x.toml").write_text(
        f'contexts = ["docs"]\ntraces = ["steady"]\ndeadlines_s = [1.0]\nmost_invalid = {most}\n'
        '[[schemes]]\npolicy = "cachegen"\ncodec = "kvstream"\n'
    )
    from testbed import summary

    said = summary.summarise
    invalid = {"seen": 9, "invalid": 2}
    monkeypatch.setattr(summary, "summarise", lambda *a, **k: (s := said(*a, **k)) | {"units": s["units"] | invalid})
    assert main(["simulate", "x.toml"]) == status
    assert ("2 of 9 units are invalid" in capsys.readouterr().err) == bool(status)


# --- report


@pytest.fixture
def made(here: Path) -> Path:
    return make_run(here / "made", contexts=("docs",), spoil=False).path


def test_a_report_can_be_of_another_baseline(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    summary = printed(capsys, "report", str(made), "--baseline", "text", "--json")
    assert summary["baseline"] == "text"
    assert "against text" in (made / "report.html").read_text()
    assert "baseline 'x' is none of the schemes" in refused(capsys, "report", str(made), "--baseline", "x")


def test_sessions_as_csv(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    assert main(["report", str(made), "--csv", "x.csv"]) == 0
    assert capsys.readouterr().out.endswith("x.csv\n")
    lines = Path("x.csv").read_text().splitlines()
    assert len(lines) == 1 + 21
    assert "fidelity.ok" in lines[0].split(",")
    assert "there is no folder nope" in refused(capsys, "report", str(made), "--csv", "nope/x.csv")


# --- what others write


def test_what_was_written_is_told_as_json(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    found = printed(capsys, "policy", "new", "my-policy", "--json")
    assert found == {"file": str(here / "my_policy.py"), "policy": "./my_policy.py:MyPolicy"}
    assert "work/policy.py" in printed(capsys, "lab", "start", "work", "--json")["files"]


# --- paths and addresses


def test_paths_that_cannot_be_used_are_bad_input(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "file").touch()
    assert "is a directory" in refused(capsys, "codec", "inspect", str(here))
    assert "not a directory" in refused(capsys, *QUICK, "--runs", "file/x")
    assert "x.toml" in refused(capsys, "simulate", "file/x.toml")


@pytest.mark.parametrize("port", ["99999", "-3", "http"])
def test_a_port_that_is_none(capsys: pytest.CaptureFixture[str], made: Path, port: str) -> None:
    assert "is no port; give 0 to 65535" in refused(capsys, "dashboard", str(made), "--port", port)
    assert "is no port" in refused(capsys, "serve", "store", "--port", port)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "nice", lambda more: 0)  # the tests after this one go on at full speed
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}: address already in use" in refused(capsys, "dashboard", str(made), "--port", port)


def test_a_sender_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from testbed import fetching

    monkeypatch.setattr(fetching, "set_threads", lambda number: None)
    call = ("fetch", "http://127.0.0.1:1", "docs", "--model", str(tiny_folder))
    assert "no sender answers at http://127.0.0.1:1" in refused(capsys, *call)
