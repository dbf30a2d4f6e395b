"""What a run was measured on: versions, kernel, commit. Goes into `manifest.json`."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvstream.testbed.errors import MachineError
from kvstream.testbed.host.process import IMPORT_ROOT

PACKAGES = ("kvstream", "torch", "transformers", "numba", "numpy", "scipy", "aiohttp", "mininet", "pyroute2", "torchac")


def describe() -> dict[str, Any]:
    """Versions, kernel, processor and commit; None for what is not installed."""
    return {
        "git": _commit(),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES},
        "kernel": platform.release(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def command() -> str:
    """The command line that is running, as one would type it again."""
    return shlex.join(["kvstream", *sys.argv[1:]])


def cache_dir() -> Path:
    """Where prepared stores and calibrations are kept: `$XDG_CACHE_HOME/kvstream`."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kvstream"
    except RuntimeError:
        raise MachineError("this user has no home folder; set XDG_CACHE_HOME to a folder for caches") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout, `-dirty` with changes; None for an installed package."""
    command = ["git", "-C", str(IMPORT_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def processor() -> str | None:
    """The processor's name, where the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
