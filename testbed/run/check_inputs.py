"""What an experiment names but does not hold: traces, links, policies, codecs, contexts, workloads, and their files.

Everything is looked up before anything runs, so that a typing error costs no time. The hashes of files stand in a run's
manifest, so that a run is not resumed with others under the same name.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from kvstream.codec import registry as codecs
from kvstream.codec.errors import CodecError
from kvstream.testbed.config import build, specs
from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.encoding import prepare
from kvstream.testbed.errors import SpecError
from kvstream.testbed.models import catalogue
from kvstream.testbed.simulator.trial import try_codec, try_policy
from kvstream.testbed.workloads import contexts as workload
from kvstream.testbed.workloads import precomputed, synthetic
from kvstream.traces.resolve import open_trace

_DEVICE: Final = re.compile(r"cpu|cuda(:\d+)?")


def check(experiment: Experiment) -> None:
    """Raise TraceError, SpecError, PolicyError or CodecError for the first thing that is missing or unusable.

    Neither torch nor a model is loaded: settings of codecs, and levels of the user's own contexts, are checked later.
    """
    if not _DEVICE.fullmatch(experiment.device):
        raise SpecError(f"device {experiment.device!r}: use cpu, cuda, or cuda:1 and so on")
    folder = Path(experiment.model)
    if (folder.is_absolute() or experiment.model.startswith(".")) and not folder.is_dir():
        raise SpecError(f"model folder {folder} does not exist")
    if not folder.is_dir():
        catalogue.folder_of(experiment.model)
    for text in experiment.links:
        link = build.make_link(text)
        for extra in filter(None, (link.cross_trace, link.up_trace)):
            open_trace(extra)
    experiment.units()  # opens its traces
    for codec in experiment.codecs:
        try_codec(codec)
        name, _ = build.codec_spec(codec)
        if name not in codecs.names():
            raise CodecError(codecs.unknown(name))
    if experiment.workload:
        _check_workload(experiment)
    else:
        prepare.find_contexts(experiment.contexts)
    for policy in dict.fromkeys(scheme.policy for scheme in experiment.schemes):
        try_policy(policy)
    for scheme in experiment.schemes:
        build.make_policy(scheme.policy)
        n_levels = _levels_of(experiment, scheme.codec)
        if n_levels is not None:
            build.check_levels(scheme.policy, n_levels)


def _check_workload(experiment: Experiment) -> None:
    """Raise SpecError for an unknown workload, or a context or codec that it does not have."""
    workload = synthetic.parse(experiment.workload)
    for context in experiment.contexts:
        synthetic.tokens_of(context)
    for codec in experiment.codecs:
        workload.ladder(codec)


def _levels_of(experiment: Experiment, codec: str) -> int | None:
    """Levels of a codec, where they are known without encoding anything."""
    if experiment.workload:
        return len(synthetic.parse(experiment.workload).ladder(codec))
    offer = precomputed.load(experiment.contexts[0], codec) if experiment.model == "bundled" else None
    return None if offer is None else len(offer.manifest.levels)


def files(experiment: Experiment) -> dict[str, str]:
    """[path as written]: SHA-256 of every file that holds a policy, a codec or a context. Traces have their own."""
    named = [(scheme.policy, "policy") for scheme in experiment.schemes]
    named += [(scheme.codec, "codec") for scheme in experiment.schemes]
    classes = (specs.parse(text, what).name.rpartition(".py:")[0] for text, what in named)
    shipped = workload.shipped_contexts()
    contexts = () if experiment.workload else (name for name in experiment.contexts if name not in shipped)
    paths = dict.fromkeys([*(f"{path}.py" for path in classes if path), *contexts])
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
