"""Measure in advance what kvstream ships for its bundled model, so that a first run need not.

    python scripts/ship.py [CODEC ...]

For every codec: its profile and the distortion of its levels (testbed/encoding/calibration/shipped), and for every
shipped context the manifest and this machine's compute times (testbed/workloads/data/precomputed), from which the
simulator and the lab work.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import asdict

from kvstream.testbed.encoding import calibrate, prepare
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.engine.threads import set_threads
from kvstream.testbed.host import machine
from kvstream.testbed.receiver.model_worker import ModelWorker
from kvstream.testbed.results.folder import write_whole
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads import contexts as workload
from kvstream.testbed.workloads import precomputed

CODECS = ("kvstream", "cachegen", "uniform", "artifact")


def main(codecs: list[str]) -> None:
    contexts = [context.name for context in workload.load_contexts()]
    prepared = prepare.prepare("bundled", contexts, codecs, precomputed.CHUNK_TOKENS, print)
    for folder in ("profiles", "distortions"):
        for file in (machine.cache_dir() / folder).glob("*"):
            target = calibrate.SHIPPED / folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    set_threads(None)
    worker = ModelWorker(ModelEngine(load_model(prepared.model)), Store(prepared.path, create=False))
    precomputed.FOLDER.mkdir(exist_ok=True)
    facts = {key: machine.describe()[key] for key in ("processor", "cores", "versions")}
    try:
        for (context, codec), key in prepared.ids.items():
            costs = asyncio.run(worker.prepare(key))
            body = {"manifest": prepared.manifests[context, codec].to_json(), "costs": asdict(costs)}
            write_whole(precomputed.path_of(context, codec), body | {"machine": facts})
            print(precomputed.path_of(context, codec).name, json.dumps(body["costs"]["decode_s"][0]))
    finally:
        worker.close()


if __name__ == "__main__":
    main(sys.argv[1:] or list(CODECS))
