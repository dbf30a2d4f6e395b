"""What the code imports, read from its source: modules, rooms and the floors of `testbed/`.

Imports inside functions and under TYPE_CHECKING count, lazy ones by name (registries) do not. The picture in
CONTRIBUTING.md is drawn from it, and tests/test_house.py checks it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("traces", "codec", "policies", "testbed")
MAY_IMPORT: dict[str, set[str]] = {
    "traces": set(),
    "codec": set(),
    "policies": {"traces"},
    "testbed": {"traces", "codec", "policies"},
}
FLOORS = (
    ("commands",),
    ("dashboard", "lab"),
    ("report",),
    ("run", "requests"),
    ("connectors",),
    ("receiver", "encoding"),
    ("simulator", "engine"),
    ("results", "workloads", "models"),
    ("net", "config"),
    ("session", "emulator"),
    ("store", "host"),
    ("cli",),
    ("files", "terminal"),
    ("events", "errors"),
)
"""Rooms of `testbed/`, from the top floor down; a room imports only from floors below its own. `cli` stands near the
ground because it loads the commands by their names."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name, a package by its folder's; not the files that students are given."""
    found = {"kvstream": ROOT / "kvstream" / "__init__.py"}
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            if file.is_relative_to(ROOT / "testbed" / "lab" / "files"):
                continue
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(("kvstream", *parts)).removesuffix(".__init__")] = file
    return found


def names(file: Path, module: str = "") -> Iterator[tuple[str, int]]:
    """(full name, line) of everything that a file imports; `module` resolves its relative imports."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


@cache
def graph() -> dict[str, dict[str, int]]:
    """For every module the modules of the package that it imports, each with the line.

    A plain `import kvstream`, which asks where the package lies and loads nothing, is left out."""
    known = modules()
    found: dict[str, dict[str, int]] = {}
    for module, file in known.items():
        found[module] = {}
        for name, line in names(file, module):
            target = next((part for part in _prefixes(name) if part in known), None)
            if target and target != module and name != "kvstream":
                found[module].setdefault(target, line)
    return found


def _prefixes(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def room_of(module: str) -> str:
    """`traces`, `codec`, `policies` or, by their rooms, `testbed/net`; empty for kvstream/__init__.py."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2]) if parts[:1] == ["testbed"] else "".join(parts[:1])


def room_edges() -> set[tuple[str, str]]:
    """(room, room that it imports), as `room_of` names them."""
    pairs = {(room_of(module), room_of(other)) for module, others in graph().items() for other in others}
    return {(room, other) for room, other in pairs if room and other and room != other}


def libraries(*rooms: str) -> list[str]:
    """Third-party packages that the files of these rooms import anywhere."""
    found = {
        name.partition(".")[0]
        for module, file in modules().items()
        if room_of(module) in rooms
        for name, _ in names(file, module)
    }
    return sorted(found - set(sys.stdlib_module_names) - {"kvstream"})


def circles() -> list[list[str]]:
    """The import circles, each once: the shortest way from a module back to itself."""
    found: dict[frozenset[str], list[str]] = {}
    for start in graph():
        way = _way_back(start)
        if way:
            found.setdefault(frozenset(way), way)
    return sorted(found.values(), key=lambda way: (len(way), way))


def _way_back(start: str) -> list[str]:
    """Breadth first, so the shortest; empty when nothing leads back."""
    edges = graph()
    ways = {start: [start]}
    queue = [start]
    for module in queue:
        for other in edges[module]:
            if other == start:
                return ways[module]
            if other not in ways:
                ways[other] = [*ways[module], other]
                queue.append(other)
    return []
