"""Policies by name, from files, and the errors that name what there is."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from kvstream.policies import registry
from kvstream.policies.api import Choice, Policy
from kvstream.policies.errors import PolicyError
from tests.policies.observations import observation

STUDENT = """
from __future__ import annotations
from dataclasses import dataclass
from kvstream.policies.api import Choice, Observation

@dataclass
class Mine:
    gain: float = 2.0

    def choose(self, obs: Observation) -> Choice:
        return Choice(min(int(self.gain), obs.n_levels - 1))

class Helper:
    pass
"""


@pytest.fixture
def student(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(STUDENT)
    return str(path)


@pytest.mark.parametrize("name", registry.POLICIES)
def test_every_policy_is_a_documented_dataclass_with_settings_of_plain_types(name: str) -> None:
    cls = registry.policy_class(name)
    assert cls.__doc__
    assert sys.modules[cls.__module__].__doc__
    assert dataclasses.is_dataclass(cls)
    policy = registry.make(name)
    assert isinstance(policy, Policy)
    for key, default in registry.settings(name).items():
        assert isinstance(default, int | float | str), key
    assert registry.is_clairvoyant(cls) == (name in ("oracle", "artifact-oracle"))


def test_a_fresh_policy_every_time() -> None:
    assert registry.make("bola") is not registry.make("bola")


def test_settings_are_checked() -> None:
    assert registry.settings("mpc") == {"horizon": 5, "first": "medium"}
    assert registry.make("mpc", {"horizon": 3}).horizon == 3  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match="no setting 'depth'; choose from horizon, first"):
        registry.make("mpc", {"depth": 3})


def test_an_unknown_policy_lists_the_valid_names() -> None:
    with pytest.raises(PolicyError, match=r"unknown policy 'cachgen'; did you mean cachegen"):
        registry.policy_class("cachgen")


def test_a_policy_from_a_file(student: str) -> None:
    policy = registry.make(f"{student}:Mine", {"gain": 1.0})
    assert policy.choose(observation()) == Choice(1)
    assert registry.settings(f"{student}:Mine") == {"gain": 2.0}


def test_a_changed_file_is_read_again(student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a second, at the same size: Python's own bytecode would be the old one's."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for gain, level in (("2.0", 2), ("0.0", 0), ("1.0", 1), ("0.0", 0)):
        Path(student).write_text(STUDENT.replace("= 2.0", f"= {gain}"))
        os.utime(student, (1e9, 1e9))
        assert registry.make(f"{student}:Mine").choose(observation()) == Choice(level)


def test_a_file_without_the_class_says_which_it_has(student: str) -> None:
    with pytest.raises(PolicyError, match="no class 'Yours'; it has Mine"):
        registry.policy_class(f"{student}:Yours")
    with pytest.raises(PolicyError, match="must be a class with a method choose"):
        registry.policy_class(f"{student}:Helper")


def test_a_broken_or_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="does not exist"):
        registry.policy_class(f"{tmp_path}/none.py:Mine")
    broken = tmp_path / "broken.py"
    broken.write_text("def choose(:\n")
    with pytest.raises(PolicyError, match="cannot be imported: SyntaxError"):
        registry.policy_class(f"{broken}:Mine")


def test_a_constructor_that_raises_is_a_policy_error(tmp_path: Path) -> None:
    path = tmp_path / "sour.py"
    path.write_text("class Sour:\n    def __init__(self):\n        1 / 0\n    def choose(self, obs):\n        pass\n")
    with pytest.raises(PolicyError, match="cannot be built: ZeroDivisionError"):
        registry.make(f"{path}:Sour")


def test_names_import_no_policy() -> None:
    code = (
        "import sys; from kvstream.policies import registry; registry.names(); "
        "print('kvstream.policies.optimum' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "body", ["sys.exit()", "class P:\n    def __init__(self): sys.exit()\n    def choose(self, obs): ..."]
)
def test_a_policy_that_ends_the_program_is_refused(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text(f"import sys\n\n{body}\n")
    with pytest.raises(PolicyError, match="SystemExit"):
        registry.make(f"{file}:P")


def plug_in(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An installed package that declares the policy `theirs`."""
    points = EntryPoints([EntryPoint("theirs", value, registry.ENTRY_POINT_GROUP)])
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))


def test_a_plug_in_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "kvstream.policies.fixed:Highest")
    assert "theirs" in registry.names()
    assert registry.make("theirs").choose(observation()) == Choice(2)


def test_a_broken_plug_in_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "no_such_package:Policy")
    with pytest.raises(PolicyError, match=r"plug-in 'theirs' \(no_such_package:Policy\) cannot be imported"):
        registry.make("theirs")
