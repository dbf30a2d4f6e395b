"""What an experiment names and does not hold: traces, links, policies, codecs, contexts, and the files of some.

Everything is looked for before anything runs, so that a slip of the pen costs no time; files stand with their hashes
in a run's manifest, so that a run does not go on with others under the same name.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from codec import registry as codecs
from codec.errors import CodecError
from testbed import plugs, prepare, shipped, specs, synthetic, workload
from testbed.errors import SpecError
from testbed.experiment import Experiment
from traces.resolve import open_trace

_DEVICE: Final = re.compile(r"cpu|cuda(:\d+)?")


def check(experiment: Experiment) -> None:
    """Raise TraceError, SpecError, PolicyError or CodecError for the first thing that is not there or cannot be used.

    Neither torch nor a model is loaded: codecs' settings and the levels of contexts of one's own are found out later.
    """
    if not _DEVICE.fullmatch(experiment.device):
        raise SpecError(f"device {experiment.device!r}: use cpu, cuda, or cuda:1 and so on")
    folder = Path(experiment.model)
    if (folder.is_absolute() or experiment.model.startswith(".")) and not folder.is_dir():
        raise SpecError(f"model folder {folder} does not exist")
    for text in experiment.links:
        link = plugs.make_link(text)
        for extra in filter(None, (link.cross_trace, link.up_trace)):
            open_trace(extra)
    for trace in dict.fromkeys(unit.trace for unit in experiment.units()):
        open_trace(trace)
    for codec in experiment.codecs:
        name, _ = plugs.codec_spec(codec)
        if name not in codecs.names():
            raise CodecError(f"no codec is called {name!r}; known are {', '.join(codecs.names())}")
    if not experiment.workload:
        prepare.find_contexts(experiment.contexts)
    for scheme in experiment.schemes:
        plugs.make_policy(scheme.policy)
        n_levels = _levels_of(experiment, scheme.codec)
        if n_levels is not None:
            plugs.check_levels(scheme.policy, n_levels)


def _levels_of(experiment: Experiment, codec: str) -> int | None:
    """Levels of a codec, where they are known without encoding anything."""
    if experiment.workload:
        return len(synthetic.parse(experiment.workload).ladder(codec))
    offer = shipped.load(experiment.contexts[0], codec) if experiment.model == "bundled" else None
    return None if offer is None else len(offer.manifest.levels)


def files(experiment: Experiment) -> dict[str, str]:
    """[path as written]: SHA-256 of every file of a policy or a context. Traces have hashes of their own."""
    policies = (specs.parse(scheme.policy, "policy").name.rpartition(".py:")[0] for scheme in experiment.schemes)
    shipped_contexts = {context.name for context in workload.load_contexts()}
    contexts = () if experiment.workload else (name for name in experiment.contexts if name not in shipped_contexts)
    named = dict.fromkeys([*(f"{path}.py" for path in policies if path), *contexts])
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in named}
