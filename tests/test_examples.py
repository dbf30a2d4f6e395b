"""The examples do what they show."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from types import ModuleType

import pytest

from testbed import policy_check
from testbed.cli import build_parser, main
from testbed.plugs import make_policy
from tests.pages import ROOT, kvstream_arguments
from tests.testbed.made_run import make_run

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_policy_keeps_its_contract():
    findings = policy_check.check(lambda: make_policy(f"{EXAMPLES / 'my_policy.py'}:MyPolicy"))
    # how long a choice takes depends on what else the machine does
    assert [finding for finding in findings if not finding.ok and not finding.name.endswith(" ms")] == []


def test_comparison_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["simulate", "compare.toml", "--runs", str(tmp_path), "--fail-if", "my-policy.violations>0.9"]) == 0
    summary = json.loads((tmp_path / "compare" / "summary.json").read_text())
    rows = {entry["scheme"]: entry for entry in summary["schemes"]}
    assert rows["my-policy"]["policy_faults"] == 0
    assert rows["my-policy"]["met"] > 0


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in names if f"]({name})" not in listed} == set()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_experiments_are_sound(name, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    assert main(["simulate", name, "--dry-run", "--quick"]) == 0
    assert "sessions, in the simulator" in capsys.readouterr().out


def test_job_is_yaml_and_names_real_commands():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    job = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for part in job["jobs"].values() for step in part["steps"] if "run" in step]
    lines = [line for step in steps for line in step.splitlines()]
    calls = [line.replace("kvstream/run_testbed.sh", "./run_testbed.sh") for line in lines]
    parsed = [build_parser().parse_args(argv) for call in calls if (argv := kvstream_arguments(call)) is not None]
    assert {args.command for args in parsed} == {"policy", "simulate", "doctor", "run"}


def test_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="the extra [run] is not installed")
    run = make_run(tmp_path / "runs" / "main")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "results.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before committing"
            exec("".join(cell["source"]), names)
    assert len(names["sessions"]) == len(run.rows())
