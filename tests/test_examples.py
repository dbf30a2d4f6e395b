"""The examples do what they show."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvstream
from kvstream.testbed.cli import main
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.models.catalogue import MODELS
from kvstream.testbed.results import summary as summaries
from kvstream.testbed.simulator import policy_check
from tests.pages import ROOT
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


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in names if f"]({name})" not in listed} == set()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_experiments_are_sound(name, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    assert main(["simulate", name, "--dry-run", "--quick"]) == 0
    assert "sessions, in the simulator" in capsys.readouterr().out


KVSTREAM = f"""#!/bin/sh
exec {sys.executable} -m kvstream.testbed.cli "$@"
"""
RUN_TESTBED = f"""#!/bin/sh
[ "$1" = doctor ] && exec {sys.executable} -m kvstream.testbed.cli doctor --help
exec {sys.executable} -m kvstream.testbed.cli "$@" --dry-run
"""


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """The folder of a job after its checkouts: a repository with a policy and an experiment, the policy as it was
    before, kvstream; and programs of the machine, of which only kvstream does something."""
    for name in ("my_policy.py", "compare.toml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "before")
    was = (tmp_path / "before" / "my_policy.py").read_text(encoding="utf-8")
    (tmp_path / "before" / "my_policy.py").write_text(was.replace("reserve_s: float = 0.03", "reserve_s: float = 0.05"))
    programs = {"bin/kvstream": KVSTREAM, "kvstream/run_testbed.sh": RUN_TESTBED}
    for name, text in (programs | dict.fromkeys(("bin/pip", "bin/sudo"), "#!/bin/sh\n")).items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def test_the_jobs_of_the_workflow_run(runner: Path) -> None:
    """Every command of both jobs, those with emulated links as dry runs; and what they upload is there."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    jobs = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))["jobs"]
    summary = runner / "summary.md"
    summary.touch()
    environment = os.environ | {"PATH": f"{runner / 'bin'}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(summary)}
    environment |= {"PYTHONPATH": str(ROOT)}
    commands = []
    for step in (step for job in jobs.values() for step in job["steps"] if "run" in step):
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=runner / step.get("working-directory", "."),
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{step['run']}\n{done.stdout}{done.stderr}"
        commands.append(step["run"])
    assert len(commands) >= 8
    rows = {one["scheme"]: one for one in json.loads((runner / "runs/compare/summary.json").read_text())["schemes"]}
    assert rows["my-policy"]["policy_faults"] == 0
    assert rows["my-policy"]["met"] > 0
    paths = jobs["simulate"]["steps"][-1]["with"]["path"].split()
    assert {file.name for path in paths for file in runner.glob(path)} == {"runs", "thresholds.xml", "compared.xml"}
    assert list((runner / "runs" / "compare" / "figures").glob("*.svg")), "the job's extra draws the figures"
    shown = summary.read_text(encoding="utf-8")
    assert shown.count("## kvstream") == 2
    assert "my-policy.violations worse by 0.1` | ✅ kept" in shown


def run_notebook(name: str) -> dict[str, Any]:
    """The names that are there at a notebook's end."""
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before committing"
            exec("".join(cell["source"]), names)
    return names


def test_the_notebook_counts_what_the_report_counts(tmp_path, monkeypatch):
    """Units that are invalid for one scheme, or that one has not run, are left out for all."""
    pytest.importorskip("seaborn", reason="the extra [run] is not installed")
    run = make_run(tmp_path / "runs" / "main")
    next(run.cells.glob("000-*-oracle.json")).unlink()
    summary = summaries.of_run(run.rebuild(), run.manifest)
    assert (summary["units"]["invalid"], summary["units"]["incomplete"]) == (1, 1)
    monkeypatch.chdir(tmp_path)
    names = run_notebook("results.ipynb")
    table = names["table"]
    for entry in summary["schemes"]:
        assert table.loc[entry["scheme"], "n"] == entry["n"] == 10
        assert table.loc[entry["scheme"], "met"] == entry["met_rate"]
    assert len(names["sessions"]) == 10 * len(summary["schemes"])
    assert len(kvstream.load_results(run.path, every=True)) == len(run.rows())


def test_the_notebook_of_the_real_model():
    if not MODELS["smollm2"].is_here:
        pytest.skip("SmolLM2 is not here; get it with: kvstream model get smollm2")
    names = run_notebook("real_model.ipynb")
    assert all(names["answered"])
    assert names["ladder"]["bits"].is_monotonic_increasing
    assert names["ladder"]["KL"].iloc[-1] < 0.05 < names["ladder"]["KL"].iloc[0]


def test_the_page_on_codecs_shows_the_example() -> None:
    page = (ROOT / "docs" / "howto" / "own-codec.md").read_text()
    assert f"```python file=my_codec.py\n{(ROOT / 'examples' / 'my_codec.py').read_text()}```" in page
