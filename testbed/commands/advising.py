"""`kvstream advise`: what compressing a cache saves at a bandwidth."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvstream.testbed.commands.arguments import count
from kvstream.testbed.terminal import say

if TYPE_CHECKING:
    from kvstream.testbed.run.advise import Basis


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    advise = subparsers.add_parser("advise", help="what compressing a context's cache saves at your bandwidth")
    advise.add_argument(
        "model",
        help="folder or name of a causal language model, or 'bundled', measured here; with compute=h200 behind it the "
        "times are that GPU's by its data sheet. Of mistral-7b, llama-34b and llama-70b only shapes are known",
    )
    advise.add_argument("--tokens", type=count, required=True, help="tokens of the context")
    advise.add_argument("--bandwidth", required=True, help="of the link to the receiver, such as 3Gbps")
    advise.add_argument("--device", default="cpu", help="device of the model and the codecs: cpu (default) or cuda")
    advise.add_argument("--json", action="store_true", help="print as JSON")
    advise.set_defaults(run=advise_command)


def advise_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.config import specs
    from kvstream.testbed.run import advise
    from kvstream.testbed.workloads import synthetic
    from kvstream.traces.units import parse_rate

    bandwidth_bps = parse_rate(args.bandwidth)
    spec = specs.parse(args.model, "model")
    is_known = spec.name in synthetic.models()
    basis = advise.of_workload(args.model) if is_known else _measured(spec.name, args.device, spec.settings)
    advice = advise.advise(basis, args.tokens, bandwidth_bps)
    print(json.dumps(_finite(advice), indent=1) if args.json else advise.text(advice))
    return 0


def _measured(name: str, device: str, settings: Mapping[str, str]) -> Basis:
    from kvstream.testbed.commands.codecs import load
    from kvstream.testbed.engine.threads import set_threads
    from kvstream.testbed.errors import SpecError
    from kvstream.testbed.run import advise, advise_model

    if settings.keys() - {"compute"}:
        raise SpecError(f"model {name} has the one setting compute, not {', '.join(settings.keys() - {'compute'})}")
    set_threads(None)
    model = load(name, device)
    profile = advise_model.workload_of(model, settings["compute"]) if settings else None
    basis = advise_model.of_model(model, lambda line: say(line, error=True))
    return basis if profile is None else advise.on_profile(basis, profile)


def _finite(value: Any) -> Any:
    """JSON has no infinity: a bandwidth below which something is always so becomes the string 'any'."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return "any" if isinstance(value, float) and math.isinf(value) else value
