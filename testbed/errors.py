"""Errors of experiments and machines. Each message says what, where and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Final

INSTALL: Final = (
    "pip install -e '.[run]'"  # in a checkout
    if (Path(__file__).resolve().parents[1] / "pyproject.toml").is_file()
    else "pip install 'kvstream-testbed[run]'"
)
"""The command that installs what a run needs."""
PLOT: Final = ("matplotlib", "seaborn", "pandas")
"""Packages of the extra `[plot]`, which `[run]` includes."""
S3: Final = ("s3fs", "fsspec", "aiobotocore")
"""Packages of the extra `[s3]`."""


def install(package: str | None) -> str:
    """The command that installs a missing package, with the smallest extra that has it."""
    extra = "plot" if package in PLOT else "s3" if package in S3 else "run"
    return INSTALL.replace("run", extra)


class SpecError(ValueError):
    """An experiment, command line or settings string that cannot be used."""


class MachineError(RuntimeError):
    """This machine lacks something the run needs; the message names the line that fixes it."""
