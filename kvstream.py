"""The public names of kvstream, from all of its rooms, imported when first used.

    import kvstream
    trace = kvstream.open_trace("uniform,low=10Mbps,high=50Mbps,hold=0.2s,seed=7")

Policies, plug-ins and notebooks need no other import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Trace": "traces.trace",
    "TraceError": "traces.errors",
    "open_trace": "traces.resolve",
    "Codec": "codec.api",
    "CodecError": "codec.errors",
    "Level": "codec.api",
    "CANCEL": "policies.api",
    "Choice": "policies.api",
    "Forecast": "policies.api",
    "InFlight": "policies.api",
    "KEEP": "policies.api",
    "Observation": "policies.api",
    "Policy": "policies.api",
    "PolicyError": "policies.errors",
    "Replace": "policies.api",
    "TEXT": "policies.api",
    "Transfer": "policies.api",
    "MachineError": "testbed.errors",
    "SpecError": "testbed.errors",
    "Manifest": "testbed.manifest",
    "Session": "testbed.session",
    "simulate": "testbed.simulator",
    "Store": "testbed.store",
    "calculate_kv": "testbed.llm",
    "generate_with_kv": "testbed.llm",
    "get_kv": "testbed.store",
    "store_kv": "testbed.store",
    "load_results": "testbed.results:load",
}

__all__ = sorted(_NAMES)  # mypy and ruff cannot see through the table; `__getattr__` serves it

if TYPE_CHECKING:
    from codec.api import Codec as Codec
    from policies.api import Choice as Choice
    from policies.api import Observation as Observation
    from traces.trace import Trace as Trace


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'kvstream' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
