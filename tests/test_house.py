"""The rules that keep the house tidy: who imports whom, what stays light, what is public."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvstream

ROOT = Path(__file__).parent.parent
ROOMS = ("traces", "codec", "policies", "testbed")
ALLOWED = {"traces": set(), "codec": set(), "policies": {"traces"}, "testbed": {"traces", "codec", "policies"}}


def imports(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, type checking included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        foreign = (imports(file) & set(ROOMS)) - {room} - ALLOWED[room]
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(foreign)}"


LIGHT = (
    "traces.resolve",
    "policies.registry",
    "policies.oracle",
    "testbed.simulator",
    "testbed.simulated",
    "testbed.cli",
)


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_load_neither_torch_nor_mininet(module):
    code = (
        f"import sys, {module}; heavy = ('torch', 'mininet', 'numba', 'seaborn', 'matplotlib', 'scipy.stats'); "
        "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{module} loads {done.stderr}"


def test_help_answers_at_once():
    def seconds() -> float:
        """Of a processor, which other tests that run at the same time hardly change."""
        before = os.times()
        subprocess.run([sys.executable, "-m", "testbed.cli", "--help"], capture_output=True, cwd=ROOT, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # the fastest of a few: a busy machine only ever adds
    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("name", kvstream.__all__)
def test_public_names_resolve(name):
    pytest.importorskip("torch", reason="some public names need the extra [run]")
    assert getattr(kvstream, name) is not None
