"""Policies by name, from files, and the errors that name what there is."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from policies import registry
from policies.api import Choice, Policy
from policies.errors import PolicyError
from tests.policies.observations import observation

STUDENT = """
from __future__ import annotations
from dataclasses import dataclass
from policies.api import Choice, Observation

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
    with pytest.raises(PolicyError, match="no setting 'depth'; it has horizon, first"):
        registry.make("mpc", {"depth": 3})


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"no policy is called 'cachgen'; known are .*cachegen"):
        registry.policy_class("cachgen")


def test_a_policy_from_a_file(student: str) -> None:
    policy = registry.make(f"{student}:Mine", {"gain": 1.0})
    assert policy.choose(observation()) == Choice(1)
    assert registry.settings(f"{student}:Mine") == {"gain": 2.0}


def test_a_changed_file_is_read_again(student: str) -> None:
    registry.make(f"{student}:Mine")
    Path(student).write_text(STUDENT.replace("= 2.0", "= 0.0"))
    assert registry.make(f"{student}:Mine").choose(observation()) == Choice(0)


def test_a_file_without_the_class_says_which_it_has(student: str) -> None:
    with pytest.raises(PolicyError, match="no class 'Yours'; it has Mine"):
        registry.policy_class(f"{student}:Yours")
    with pytest.raises(PolicyError, match="not a class with a method choose"):
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
    code = "import sys; from policies import registry; registry.names(); print('policies.optimum' in sys.modules)"
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
