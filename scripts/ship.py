"""Make what kvstream ships already measured for its bundled model, so that a first run need not.

    python scripts/ship.py [CODEC ...]

For every codec: its profile and the distortion of its levels (testbed/calibration/shipped), and for every shipped
context the manifest and this machine's compute times (testbed/offers), from which the simulator and the lab work.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import asdict

from testbed import calibrate, machine, prepare, shipped, workload
from testbed.compute import Compute, set_threads
from testbed.llm import Model
from testbed.results import write_whole
from testbed.store import Store
from testbed.worker import Worker

CODECS = ("kvstream", "cachegen", "uniform", "artifact")


def main(codecs: list[str]) -> None:
    contexts = [context.name for context in workload.load_contexts()]
    prepared = prepare.prepare("bundled", contexts, codecs, shipped.CHUNK_TOKENS, print)
    for folder in ("profiles", "distortions"):
        for file in (machine.cache_dir() / folder).glob("*"):
            target = calibrate.SHIPPED / folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    set_threads(None)
    worker = Worker(Compute(Model.load(prepared.model)), Store(prepared.path, create=False), learns=False)
    shipped.FOLDER.mkdir(exist_ok=True)
    facts = {key: machine.describe()[key] for key in ("processor", "cores", "versions")}
    try:
        for (context, codec), key in prepared.ids.items():
            costs = asyncio.run(worker.prepare(key))
            body = {"manifest": prepared.manifests[context, codec].to_json(), "costs": asdict(costs)}
            write_whole(shipped.path_of(context, codec), body | {"machine": facts})
            print(shipped.path_of(context, codec).name, json.dumps(body["costs"]["decode_s"][0]))
    finally:
        worker.compute.close()


if __name__ == "__main__":
    main(sys.argv[1:] or list(CODECS))
