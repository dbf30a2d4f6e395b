"""What is installed: one name beside other people's packages, complete, undisturbed by files named like a room."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts.imports import ROOMS, ROOT
from tests import installed
from tests.installed import kvstream, python

pytest.importorskip("hatchling", reason="the extra [dev] is not installed")

POLICY = """
from dataclasses import dataclass
{imports}
from kvstream import Choice, Observation

@dataclass
class Mine:
    def choose(self, obs: Observation) -> Choice:
        return Choice({level})
"""
SHOUT = 'raise SystemExit(f"{__file__} was imported")\n'


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.sources(tmp_path_factory.mktemp("copy") / "kvstream")


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed.install(wheel, tmp_path_factory.mktemp("site"))


# --- what is in the archives


def test_the_wheel_has_one_name_at_its_top(wheel):
    top = {name.partition("/")[0] for name in installed.contents(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kvstream"}
    assert len(top) == 2


def test_the_wheel_has_every_file_of_the_rooms(wheel, tree):
    files = [file for room in ROOMS for file in (tree / room).rglob("*") if file.is_file()]
    own = {f"kvstream/{name}" for name in ("__init__.py", "connectors.py", "py.typed")}
    wanted = {f"kvstream/{file.relative_to(tree)}" for file in files} | own
    assert {Path(name).suffix for name in wanted} >= {
        ".py",
        ".json",
        ".toml",
        ".xz",
        ".safetensors",
        ".css",
        ".js",
        ".csv",
    }
    assert {name for name in installed.contents(wheel) if ".dist-info/" not in name} == wanted


def test_the_sdist_builds_the_same_wheel(wheel, tree, tmp_path):
    sdist = installed.build(tree, "sdist", tmp_path / "sdist")
    again = installed.build(installed.unpacked(sdist, tmp_path / "tree"), "wheel", tmp_path / "wheel")
    assert installed.contents(again) == installed.contents(wheel)


def test_an_editable_install_holds_no_copy(tree, tmp_path):
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    done = python(Path(), "-c", code, cwd=tree, PYTHONPATH=":".join(sys.path))
    assert done.returncode == 0, done.stderr
    [made] = tmp_path.glob("*.whl")
    names = [name for name in installed.contents(made) if ".dist-info/" not in name]
    assert names == ["_kvstream_testbed.pth"]


def test_a_checkout_without_links_works(tmp_path):
    """As archives and some file systems leave it: a link is a file that holds its target."""
    tree = installed.sources(tmp_path / "tree")
    for room in ROOMS:
        link = tree / "kvstream" / room
        target = link.readlink()
        link.unlink()
        link.write_text(str(target))
    code = "import kvstream.testbed.cli as cli; print(cli.__file__)"
    done = python(tree, "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == str(tree / "testbed" / "cli.py"), done.stderr


# --- what is installed


def test_the_installed_package_is_the_one_that_is_tested(site, tmp_path):
    code = "import kvstream, kvstream.testbed as testbed; print(*kvstream.__path__, *testbed.__path__)"
    done = python(site, "-c", code, cwd=tmp_path)
    package, room = done.stdout.split()
    assert (package, room) == (str(site / "kvstream"), str(site / "kvstream" / "testbed")), done.stderr
    assert not Path(room).is_symlink()


def test_commands_run_from_the_wheel(site, tmp_path):
    for arguments in (
        ["trace", "show", "step-down-up"],
        ["simulate", "--quick", "--name", "first"],
        ["lab", "start", "work"],
        ["lab", "check", "work/policy.py"],
        ["policy", "list"],
    ):
        done = kvstream(site, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        assert str(ROOT) not in done.stdout + done.stderr
    assert (tmp_path / "runs" / "first-quick" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("start", ["command", "module"])
def test_files_named_like_a_room_disturb_nothing(site, tmp_path, start):
    """A module run with -m has the folder at hand first on its path, an installed command has not."""
    for room in ("traces", "codec", "testbed"):
        (tmp_path / f"{room}.py").write_text(SHOUT)
    (tmp_path / "policies.py").write_text(POLICY.format(imports="", level=0))
    call = ["-m", "kvstream.testbed.cli"] if start == "module" else [str(site / "bin" / "kvstream")]
    for arguments in (
        ["-c", "import kvstream; kvstream.open_trace('wifi'); kvstream.simulate; kvstream.CodecError"],
        [*call, "policy", "list"],
        [*call, "simulate", "--quick", "--name", "mine", "--policy", "./policies.py:Mine", "--json"],
    ):
        done = python(site, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    assert [entry["policy_faults"] for entry in json.loads(done.stdout)["schemes"]] == [0]


def test_a_package_called_traces_keeps_working_beside_it(wheel, tmp_path):
    """A stand-in for PyPI's `traces`, which need not be installed here: the same name, a class, and a helper module."""
    site = installed.install(wheel, tmp_path / "site")
    other = site / "traces"
    other.mkdir()
    (other / "__init__.py").write_text("from traces.timeseries import TimeSeries\n")
    (other / "timeseries.py").write_text("class TimeSeries(dict):\n    pass\n")
    code = "import kvstream, traces, kvstream.traces as ours; print(traces.TimeSeries({0: 0})[0], ours is traces)"
    assert python(site, "-c", code, cwd=tmp_path).stdout.split() == ["0", "False"]
    (tmp_path / "mine.py").write_text(
        POLICY.format(imports="from traces import TimeSeries", level="TimeSeries({0: 0})[0]")
    )
    done = kvstream(site, "simulate", "--quick", "--policy", "./mine.py:Mine", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [entry["policy_faults"] for entry in json.loads(done.stdout)["schemes"]] == [0]
