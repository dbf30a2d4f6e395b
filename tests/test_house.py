"""The rules that keep the house tidy: who imports whom, how large a room gets, what stays light, what is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvstream
from scripts import imports
from scripts.imports import FLOORS, MAY_IMPORT, ROOMS, ROOT

MAX_LINES = 450
KERNELS = {
    "codec/entropy/_kernels.py": "loops that numba compiles: the coders call each other and are compiled as one unit",
    "testbed/simulator/_kernel.py": "a loop that numba compiles, with the link and the session in it, as one unit",
    "testbed/simulator/_requests_loop.py": "a loop that numba compiles, and the sessions in it, as one unit",
}
"""Modules that may be longer, with the reason."""
MAX_FILES = 15
LARGE_ROOMS = {"emulator": "one file for each thing the kernel is asked for"}


def relative(module: str) -> str:
    return str(imports.modules()[module].relative_to(ROOT))


# --- imports


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    wrong = [
        f"{relative(module)}:{line} imports {other}"
        for module, others in imports.graph().items()
        if module.startswith(f"kvstream.{room}")
        for other, line in others.items()
        if other.split(".")[1:2] not in [[allowed] for allowed in {room} | MAY_IMPORT[room]]
    ]
    assert wrong == []


def test_no_imports_in_a_circle():
    shown = [" -> ".join([*circle, circle[0]]) for circle in imports.circles()]
    assert shown == [], "\n".join(shown)


def test_every_room_of_the_testbed_has_its_floor():
    rooms = {room for room in map(imports.room_of, imports.modules()) if room.startswith("testbed/")}
    placed = [f"testbed/{room}" for floor in FLOORS for room in floor]
    assert rooms - set(placed) == set()
    assert len(placed) == len(set(placed))


def test_no_import_leads_upwards_in_the_testbed():
    floor = {f"testbed/{room}": number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{relative(module)}:{line} imports {other}"
        for module, others in imports.graph().items()
        for other, line in others.items()
        if (here := imports.room_of(module)) != (there := imports.room_of(other))
        and here in floor
        and there in floor
        and floor[there] <= floor[here]
    ]
    assert wrong == []


def python_files() -> list[Path]:
    folders = (*ROOMS, "tests", "examples", "benchmarks", "scripts", "docs")
    return [ROOT / "kvstream" / "__init__.py", *(file for name in folders for file in (ROOT / name).rglob("*.py"))]


def test_rooms_are_imported_by_their_full_names():
    """`import codec` works in a checkout, where the rooms stand at the top level, and fails once installed."""
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in python_files()
        for name, line in imports.names(file, "tests.here")
        if name.partition(".")[0] in ROOMS
    ]
    assert wrong == []


def test_imports_are_read_however_they_are_written(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import kvstream.net as n\nfrom kvstream.host import clock\nfrom . import near\nfrom ..up import above\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kvstream.a\ndef f():\n    import kvstream.b\n"
    )
    found = {name for name, _ in imports.names(file, "kvstream.room.module")}
    assert found >= {"kvstream.net", "kvstream.host.clock", "kvstream.room.near", "kvstream.up.above"}
    assert found >= {"kvstream.a", "kvstream.b"}


def test_programs_started_by_name_exist_and_start():
    """`python -m NAME` of a package takes its __main__; a module that nothing calls ends at once, without a word."""
    text = "\n".join(file.read_text() for file in imports.modules().values())
    names = set(re.findall(r'"-m",\s*"(kvstream[\w.]*)"', text))
    assert len(names) > 6
    known = imports.modules()
    files = {name: known.get(f"{name}.__main__", known.get(name)) for name in names}
    assert {
        name for name, file in files.items() if file is None or 'if __name__ == "__main__":' not in file.read_text()
    } == set()


# --- sizes


def test_modules_are_short():
    lengths = {relative(module): len(file.read_text().splitlines()) for module, file in imports.modules().items()}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert {name: lines for name, lines in long.items() if name not in KERNELS} == {}
    assert set(KERNELS) <= set(long), "not that long any more: take it off the list"


def test_rooms_are_small():
    sizes = {
        room: len([file for file in (ROOT / "testbed" / room).glob("*.py") if file.name != "__init__.py"])
        for floor in FLOORS
        for room in floor
    }
    assert {room: files for room, files in sizes.items() if files > MAX_FILES and room not in LARGE_ROOMS} == {}


# --- loading

LIGHT = (
    "kvstream.traces.resolve",
    "kvstream.policies.registry",
    "kvstream.policies.oracle",
    "kvstream.testbed.simulator.simulator",
    "kvstream.testbed.run.simulated",
    "kvstream.testbed.cli",
)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_mininet(module):
    code = (
        f"import sys, {module}; heavy = ('torch', 'mininet', 'numba', 'seaborn', 'matplotlib', 'scipy.stats'); "
        "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{module} loads {done.stderr}"


# --- public names


@pytest.mark.parametrize("name", kvstream.__all__)
def test_public_names_resolve(name):
    pytest.importorskip("torch", reason="some public names need the extra [run]")
    assert getattr(kvstream, name) is not None


def test_public_names_are_those_that_type_checkers_see():
    """The table that imports lazily and the imports below it are two lists of the same names and places."""
    source = (ROOT / "kvstream" / "__init__.py").read_text(encoding="utf-8")
    body = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n\n")[0]
    typed = {
        shown: f"{module}:{name}"
        for module, name, shown in re.findall(r"from kvstream\.(\S+) import (\w+) as (\w+)", body)
    }
    lazy = {shown: place if ":" in place else f"{place}:{shown}" for shown, place in kvstream._NAMES.items()}
    assert len(typed) == len(body.splitlines())
    assert typed == lazy
    assert kvstream.__all__ == sorted(typed)


def test_type_checkers_see_every_public_name(tmp_path):
    """A file outside the tree, as a user would write it; none of the names may be Any."""
    pytest.importorskip("mypy", reason="the extra [dev] is not installed")
    user = tmp_path / "user.py"
    lines = ["import kvstream", *(f"reveal_type(kvstream.{name})" for name in kvstream.__all__)]
    lines += [f"from kvstream import {name}" for name in kvstream.__all__]
    user.write_text("\n".join(lines) + "\n")
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        "[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n"
        "[mypy-torch.*,transformers.*,triton.*,numba.*,scipy.*]\nfollow_imports = skip\n"  # large, and not our names
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(user)], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(kvstream.__all__), done.stdout
    assert [text for text in revealed if text.startswith("Any")] == []
