"""`kvstream merge`: shards of one run that were run into folders of their own, as one run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.folder import SIMULATED, Json, Run, difference, read_cells, write_whole

_OF_A_MACHINE: Final = ("command", "git", "versions", "kernel", "processor", "cores", "costs")
"""Keys of a manifest in which shards of one run may differ; the merged one keeps each shard's, in `shards`."""


def merge(sources: Sequence[Run], into: Path) -> Run:
    """A new run with the sessions of all sources, in a folder that does not exist yet: whole or not at all.

    Raises SpecError where the sources are not parts of one run.
    """
    if into.exists():
        raise SpecError(f"{into} exists; choose another folder for the merged run")
    into.parent.mkdir(parents=True, exist_ok=True)
    part = into.with_name(f".{into.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _merge(sources, part)
        part.replace(into)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Run(into)


def _merge(sources: Sequence[Run], into: Path) -> None:
    merged = Run(into)
    merged.create(_manifest(sources))
    for source in sources:
        for file in sorted(source.cells.glob("*.json")):
            _take(merged, source, file)
        if (source.path / "packets").is_dir():
            shutil.copytree(source.path / "packets", into / "packets", dirs_exist_ok=True)
    beside = [run for source in sources if (run := Run(source.path / SIMULATED)).exists()]
    if beside:
        _merge(beside, into / SIMULATED)


def take(source: Run, into: Run) -> None:
    """Take the sessions of a part into the run that it is part of. Raises SpecError where it is not."""
    into.create(source.manifest)
    for file in sorted(source.cells.glob("*.json")):
        _take(into, source, file)
    if (source.path / "packets").is_dir():
        shutil.copytree(source.path / "packets", into.path / "packets", dirs_exist_ok=True)
    beside = Run(source.path / SIMULATED)
    if beside.exists():
        take(beside, Run(into.path / SIMULATED))


def _manifest(sources: Sequence[Run]) -> Json:
    first, *others = (run.manifest for run in sources)
    for run, other in zip(sources[1:], others, strict=True):
        named_alike = other | {"experiment": other["experiment"] | {"name": first["experiment"]["name"]}}
        if what := difference(first, named_alike):
            raise SpecError(f"{sources[0].path} and {run.path} differ in {what}: they are no shards of one run")
    networks = {name: found for one in (first, *others) for name, found in one.get("networks", {}).items()}
    shards = [{key: one[key] for key in _OF_A_MACHINE if key in one} for one in (first, *others)]
    return first | ({"networks": networks} if networks else {}) | {"shards": shards}


def _take(merged: Run, source: Run, file: Path) -> None:
    """Copy a file of cells, unless the merged run has all of its sessions."""
    target = merged.cells / file.name
    cells = read_cells(file)
    if file.name.endswith(".failure.json"):
        row = cells[0]["row"]
        if not merged.has(row["unit_id"], row["scheme"]):
            shutil.copyfile(file, target)
        return
    had = {cell["row"]["scheme"]: cell for cell in read_cells(target)} if target.is_file() else {}
    for cell in cells:
        row = cell["row"]
        if row["scheme"] in had and had[row["scheme"]] != cell:
            raise SpecError(
                f"{source.path}: another run has a session of {row['scheme']} on {row['unit_id']} with another result; "
                "merge shards of one count, each of them once"
            )
        merged.forget_failure(row["unit_id"], row["scheme"])
    new = [cell for cell in cells if cell["row"]["scheme"] not in had]
    if not had:
        shutil.copyfile(file, target)
    elif new:
        write_whole(target, {"cells": [*had.values(), *new]})
