"""Compute times of this machine: what decoding, recomputing and prefilling take here, for the simulator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from testbed import prepare
from testbed.compute import Compute, set_threads
from testbed.experiment import Experiment
from testbed.llm import Model
from testbed.manifest import Manifest
from testbed.session import Costs
from testbed.store import Store
from testbed.worker import Worker


def offers(experiment: Experiment, say: Callable[[str], None]) -> dict[tuple[str, str], tuple[Manifest, Costs]]:
    """Encode an experiment's contexts and measure, as the receiver of an emulated run does."""
    prepared = prepare.prepare(experiment.model, experiment.contexts, experiment.codecs, experiment.chunk_tokens, say)
    set_threads(None)
    worker = Worker(Compute(Model.load(prepared.model)), Store(prepared.path, create=False), learns=False)
    try:
        say("measuring what computing takes here")
        costs = asyncio.run(_measured(worker, prepared.ids.values()))
        return {pair: (prepared.manifests[pair], costs[key]) for pair, key in prepared.ids.items()}
    finally:
        worker.compute.close()


async def _measured(worker: Worker, contexts: Iterable[str]) -> dict[str, Costs]:
    """[context]: its costs, one after the other on the thread that sessions compute on."""
    return {context: await worker.prepare(context) for context in contexts}
