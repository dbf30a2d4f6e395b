"""Compute times of this machine: what decoding, recomputing and prefilling take here, for the simulator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.encoding import prepare
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.engine.threads import set_threads
from kvstream.testbed.receiver.model_worker import ModelWorker
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import Store


def offers(experiment: Experiment, say: Callable[[str], None]) -> dict[tuple[str, str], tuple[Manifest, Costs]]:
    """Encode an experiment's contexts and measure, as the receiver of an emulated run does."""
    prepared = prepare.prepare(experiment.model, experiment.contexts, experiment.codecs, experiment.chunk_tokens, say)
    set_threads(None)
    worker = ModelWorker(ModelEngine(load_model(prepared.model)), Store(prepared.path, create=False))
    try:
        say("measuring what computing takes here")
        costs = asyncio.run(_measured(worker, prepared.ids.values()))
        return {pair: (prepared.manifests[pair], costs[key]) for pair, key in prepared.ids.items()}
    finally:
        worker.close()


async def _measured(worker: ModelWorker, contexts: Iterable[str]) -> dict[str, Costs]:
    """[context]: its costs, one after the other on the thread that sessions compute on."""
    return {context: await worker.prepare(context) for context in contexts}
