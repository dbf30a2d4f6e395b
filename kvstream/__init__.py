"""kvstream: adaptive streaming of LLM KV caches over emulated links.

    import kvstream
    trace = kvstream.open_trace("uniform,low=10Mbps,high=50Mbps,hold=0.2s,seed=7")

The public names of all rooms, imported when first used. Policies, plug-ins and notebooks need no other import.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not Path(__file__).with_name("codec").is_dir():
    # A checkout on a file system, or from an archive, without links: the rooms stand beside this folder.
    __path__.append(str(Path(__file__).parents[1]))

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
    "Manifest": "testbed.store.manifest",
    "Session": "testbed.session.session",
    "SessionSettings": "testbed.session.settings",
    "simulate": "testbed.simulator.simulator",
    "Store": "testbed.store.store",
    "open_store": "testbed.store.opening",
    "calculate_kv": "testbed.engine.model",
    "generate_with_kv": "testbed.engine.model",
    "get_kv": "testbed.store.store",
    "store_kv": "testbed.encoding.encode",
    "load_results": "testbed.results.folder:load",
    "afetch": "testbed.receiver.fetch",
    "fetch": "testbed.receiver.fetch",
    "FetchedContext": "testbed.receiver.fetch",
    "SessionFailed": "testbed.session.record",
    "SessionRecord": "testbed.session.record",
    "Client": "testbed.net.client",
    "Context": "testbed.workloads.contexts",
    "Costs": "testbed.session.costs",
    "Model": "testbed.engine.model",
    "load_model": "testbed.engine.loading",
    "make_policy": "testbed.config.build",
}

__all__ = sorted(_NAMES)  # type checkers and ruff cannot see through the table; they read the imports below

if TYPE_CHECKING:
    from kvstream.codec.api import Codec as Codec
    from kvstream.codec.api import Level as Level
    from kvstream.codec.errors import CodecError as CodecError
    from kvstream.policies.api import CANCEL as CANCEL
    from kvstream.policies.api import KEEP as KEEP
    from kvstream.policies.api import TEXT as TEXT
    from kvstream.policies.api import Choice as Choice
    from kvstream.policies.api import Forecast as Forecast
    from kvstream.policies.api import InFlight as InFlight
    from kvstream.policies.api import Observation as Observation
    from kvstream.policies.api import Policy as Policy
    from kvstream.policies.api import Replace as Replace
    from kvstream.policies.api import Transfer as Transfer
    from kvstream.policies.errors import PolicyError as PolicyError
    from kvstream.testbed.config.build import make_policy as make_policy
    from kvstream.testbed.encoding.encode import store_kv as store_kv
    from kvstream.testbed.engine.loading import load_model as load_model
    from kvstream.testbed.engine.model import Model as Model
    from kvstream.testbed.engine.model import calculate_kv as calculate_kv
    from kvstream.testbed.engine.model import generate_with_kv as generate_with_kv
    from kvstream.testbed.errors import MachineError as MachineError
    from kvstream.testbed.errors import SpecError as SpecError
    from kvstream.testbed.net.client import Client as Client
    from kvstream.testbed.receiver.fetch import FetchedContext as FetchedContext
    from kvstream.testbed.receiver.fetch import afetch as afetch
    from kvstream.testbed.receiver.fetch import fetch as fetch
    from kvstream.testbed.results.folder import load as load_results  # noqa: F401
    from kvstream.testbed.session.costs import Costs as Costs
    from kvstream.testbed.session.record import SessionFailed as SessionFailed
    from kvstream.testbed.session.record import SessionRecord as SessionRecord
    from kvstream.testbed.session.session import Session as Session
    from kvstream.testbed.session.settings import SessionSettings as SessionSettings
    from kvstream.testbed.simulator.simulator import simulate as simulate
    from kvstream.testbed.store.manifest import Manifest as Manifest
    from kvstream.testbed.store.opening import open_store as open_store
    from kvstream.testbed.store.store import Store as Store
    from kvstream.testbed.store.store import get_kv as get_kv
    from kvstream.testbed.workloads.contexts import Context as Context
    from kvstream.traces.errors import TraceError as TraceError
    from kvstream.traces.resolve import open_trace as open_trace
    from kvstream.traces.trace import Trace as Trace


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kvstream-testbed")
    if name not in _NAMES:
        raise AttributeError(f"module 'kvstream' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(import_module(f"kvstream.{module}"), attribute or name)


def __dir__() -> list[str]:
    return __all__
