"""Tests over real emulated links. Each runs a function of scenarios.py in a sandbox and looks at what it returns."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.emulator import sandbox, topology
from kvstream.testbed.errors import MachineError

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.emulation)


@pytest.fixture(scope="session")
def why_not() -> str | None:
    """Why links cannot be emulated here; None where they can."""
    try:
        topology.require_programs(topology.PROGRAMS)
    except MachineError as error:
        return str(error)
    return sandbox.available()


@pytest.fixture(autouse=True)
def _needs_namespaces(why_not: str | None) -> None:
    if why_not is not None:
        pytest.skip(why_not)


def command(out: Path, name: str, settings: dict[str, Any]) -> list[str]:
    """The program that runs one scenario and leaves its result in a file."""
    return [sys.executable, "-W", "error", str(HERE / "scenarios.py"), str(out), name, json.dumps(settings)]


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., Any]:
    """Call a scenario by name, in a sandbox; gives what it returned."""

    def call(name: str, **settings: Any) -> Any:
        out = tmp_path / f"{name}.json"
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", "")}
        status = sandbox.run(command(out, name, settings), env=environment)
        assert status == 0, f"scenario {name} ended with status {status}"
        return json.loads(out.read_text())

    return call


@pytest.fixture
def steady(scenario: Callable[..., Any]) -> Callable[..., Any]:
    """A scenario whose verdicts are about the link: again, a few times, while others had the processors."""

    def call(name: str, **settings: Any) -> Any:
        for _ in range(4):
            done = scenario(name, **settings)
            every = done if isinstance(done, list) else [done]
            if all(one["verdict"]["starved"] <= 0.03 for one in every):
                break
        return done

    return call
