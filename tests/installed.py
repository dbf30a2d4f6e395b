"""The package as a user gets it: built from a copy of the sources, installed in a folder outside the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from scripts.imports import ROOMS, ROOT


def sources(folder: Path) -> Path:
    """A copy of what builds look at, its links as links."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("kvstream", *ROOMS):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(tree: Path, target: str, out: Path) -> Path:
    """`wheel` or `sdist`, by hatchling in this environment: nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    [made] = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return made


def unpacked(sdist: Path, folder: Path) -> Path:
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4; later ones ask for it
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **safely)
    [tree] = folder.iterdir()
    return tree


def contents(wheel: Path) -> dict[str, int]:
    """Names of a wheel's files with their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def install(wheel: Path, site: Path) -> Path:
    """The folder `site` with the wheel in it, and nothing that it depends on."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "--no-compile", "--target", str(site), str(wheel)], check=True, capture_output=True)
    return site


def python(site: Path, *arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Python with the installed package, not the checkout; dependencies are this environment's."""
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(site), "HOME": str(cwd), "COLUMNS": "100"} | more
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def kvstream(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command that the wheel installs."""
    return python(site, str(site / "bin" / "kvstream"), *arguments, cwd=cwd)
