"""A run over emulated links on a Ray cluster: in parts, each a shard that one machine emulates by itself.

A machine has one link to emulate on, the resource LINK, and a part takes it (and a GPU, if the experiment's device is
one). The machine builds path, sender and receiver as for a run of its own; the sessions that it returns are written by
the process that started the run, so that results, resumption and failures are those of a run on one machine. What a
lost machine was doing is done again elsewhere.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.host.process import IMPORT_ROOT
from kvstream.testbed.results import merge
from kvstream.testbed.results.folder import SIMULATED, Run
from kvstream.testbed.run import check_inputs, ray_executor
from kvstream.testbed.run.progress import Progress
from kvstream.testbed.run.ray_executor import LINK, Ray
from kvstream.testbed.run.shards import WHOLE, Shard
from kvstream.testbed.terminal import many

PARTS_PER_MACHINE: Final = 3
"""More would share the work more evenly, and spend more on building paths."""
JOB: Final = "part.pickle"
SAID: Final = 300
"""Characters of a failed part's last line that are passed on."""


def run_on_cluster(experiment: Experiment, run: Run, *, quiet: bool, shard: Shard = WHOLE, on: Ray) -> None:
    """Run every session that has no cell yet. Raises MachineError for a cluster without links."""
    if not shard.is_whole:
        raise SpecError("--executor shares the units out itself; omit --shard")
    progress = Progress(quiet)
    with ray_executor.cluster(on, check_inputs.files(experiment)):
        machines = ray_executor.links()
        if not machines:
            raise MachineError(
                f"no machine of the cluster has a link to emulate on; start them with ray start --resources "
                f"'{{\"{LINK}\": 1}}'"
            )
        count = min(len(experiment.units()), PARTS_PER_MACHINE * machines)
        todo = [part for part in (Shard(i, count) for i in range(1, count + 1)) if _is_open(experiment, run, part)]
        progress.say(f"{many(len(todo), 'part')} on {many(machines, 'machine')}, each with an emulated link of its own")
        gpus = 0 if experiment.device == "cpu" else 1
        items = ((part, _packed(run.path)) for part in todo)
        for number, done in enumerate(ray_executor.results(Part(experiment), items, machines, gpus=gpus, link=True), 1):
            _absorb(done, run)
            progress.say(f"{number} of {many(len(todo), 'part')} done")


@dataclass(frozen=True)
class Part:
    """On a machine of the cluster: runs a shard, from what a run's folder holds of it, and returns the folder."""

    experiment: Experiment

    def __call__(self, given: tuple[Shard, bytes]) -> bytes:
        shard, before = given
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _unpack(before, folder)
            (folder / JOB).write_bytes(pickle.dumps((self.experiment, shard)))
            roots = [str(IMPORT_ROOT), os.environ.get("PYTHONPATH", "")]
            done = subprocess.run(
                [sys.executable, "-m", "kvstream.testbed.run.parts", name],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:SAID]
                raise MachineError(f"part {shard} failed on {os.uname().nodename}: {said}")
            return _packed(folder)


def main(folder: str) -> int:
    """Enter a sandbox, and there run the part that the folder describes."""
    from kvstream.testbed.emulator import sandbox
    from kvstream.testbed.run.emulated import run_emulated

    if not sandbox.inside():
        return sandbox.run([sys.executable, "-m", "kvstream.testbed.run.parts", folder])
    experiment, shard = pickle.loads((Path(folder) / JOB).read_bytes())  # written by `Part`, on this machine
    run_emulated(experiment, Run(Path(folder)), quiet=True, shard=shard)
    return 0


def _is_open(experiment: Experiment, run: Run, part: Shard) -> bool:
    """Whether a session of the part is still to run."""
    beside = [(experiment.simulated(), Run(run.path / SIMULATED))] if experiment.simulated_repetitions else []
    return any(
        not its.has(unit.unit_id, scheme.name)
        for one, its in [(experiment, run), *beside]
        for unit, scheme in part.sessions(one)
    )


def _files(folder: Path) -> Iterator[Path]:
    """What of a run's folder is not made from the rest."""
    for one in (folder, folder / SIMULATED):
        yield from itertools.chain([one / "manifest.json"], sorted((one / "cells").glob("*.json")))
    yield from sorted((folder / "packets").rglob("*"))


def _packed(folder: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in _files(folder):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return data.getvalue()


def _unpack(data: bytes, folder: Path) -> None:
    """Names that lead out of the folder are bent into it by the library."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)


def _absorb(done: bytes, run: Run) -> None:
    """Take over the sessions of a part."""
    with tempfile.TemporaryDirectory() as name:
        _unpack(done, Path(name))
        merge.take(Run(Path(name)), run)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except (MachineError, SpecError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
