"""Policies by name, from a file, and from plug-ins under the entry point group `kvstream.policies`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from policies.api import Policy
from policies.errors import PolicyError

ENTRY_POINT_GROUP = "kvstream.policies"

POLICIES: dict[str, str] = {
    "cachegen": "policies.cachegen:CacheGen",
    "artifact": "policies.artifact:Artifact",
    "artifact-oracle": "policies.artifact:ArtifactOracle",
    "buffer-based": "policies.buffer_based:BufferBased",
    "fixed": "policies.fixed:Fixed",
    "lowest": "policies.fixed:Lowest",
    "highest": "policies.fixed:Highest",
    "text": "policies.fixed:Text",
    "random": "policies.random_level:Random",
    "throughput": "policies.throughput:Throughput",
    "bola": "policies.bola:Bola",
    "mpc": "policies.mpc:MPC",
    "robust-mpc": "policies.mpc:RobustMPC",
    "chance": "policies.chance:Chance",
    "kvstream": "policies.kvstream:KVStream",
    "cake": "policies.cake:Cake",
    "hicache": "policies.hicache:HiCache",
    "oracle": "policies.oracle:Oracle",
}
"""Name to `module:class`; imported when first asked for."""


def names() -> list[str]:
    """Every known policy, plug-ins included."""
    return sorted({*POLICIES, *_plug_ins()})


def policy_class(name: str) -> type[Any]:
    """The class behind a name or a `./file.py:Class`. Raises PolicyError naming the known ones."""
    if name in POLICIES:
        module, _, attribute = POLICIES[name].partition(":")
        found: Any = getattr(import_module(module), attribute)
    elif ".py:" in name:
        found = _from_file(name)
    elif name in (plug_ins := _plug_ins()):
        try:
            found = plug_ins[name].load()
        except Exception as error:
            raise PolicyError(
                f"policy plug-in {name!r} ({plug_ins[name].value}) cannot be imported: {error}"
            ) from error
    else:
        raise PolicyError(f"no policy is called {name!r}; known are {', '.join(names())}, or give ./file.py:Class")
    if not (isinstance(found, type) and callable(getattr(found, "choose", None))):
        raise PolicyError(f"policy {name!r} is {found!r}, not a class with a method choose(obs)")
    return found


def settings(name: str) -> dict[str, Any]:
    """A policy's settings and their defaults; required ones have `dataclasses.MISSING`."""
    cls = policy_class(name)
    if not dataclasses.is_dataclass(cls):
        return {}
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(cls)
        if f.init
    }


def make(name: str, given: Mapping[str, Any] | None = None) -> Policy:
    """A fresh policy for one session. `given` holds settings of the right types, SI units. Raises PolicyError."""
    cls, given, known = policy_class(name), dict(given or {}), settings(name)
    for key in given:
        if key not in known:
            raise PolicyError(f"policy {name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
    try:
        policy: Policy = cls(**given)
    except PolicyError:
        raise
    except (Exception, SystemExit) as error:  # a student's constructor may raise anything
        raise PolicyError(f"policy {name} cannot be built: {type(error).__name__}: {error}") from error
    return policy


def is_clairvoyant(policy: object) -> bool:
    """Whether the policy (or its class) is told the future."""
    return bool(getattr(policy, "clairvoyant", False))


def _from_file(name: str) -> Any:
    path_text, _, attribute = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise PolicyError(f"policy file {path_text} does not exist; give ./file.py:Class")
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    module_name = f"kvstream_policy_{digest}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up while the class is made
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise PolicyError(f"policy file {path_text} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and callable(getattr(v, "choose", None))]
        raise PolicyError(f"policy file {path_text} has no class {attribute!r}; it has {', '.join(classes) or 'none'}")
    return getattr(module, attribute)


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
