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

from kvstream.policies.api import Policy
from kvstream.policies.errors import PolicyError
from kvstream.traces.grammar import brief, is_file, plain
from kvstream.traces.nearest import nearest

ENTRY_POINT_GROUP = "kvstream.policies"

POLICIES: dict[str, str] = {
    "cachegen": "kvstream.policies.cachegen:CacheGen",
    "cachegen+compute": "kvstream.policies.cachegen:CacheGenCompute",
    "artifact": "kvstream.policies.artifact:Artifact",
    "artifact-oracle": "kvstream.policies.artifact:ArtifactOracle",
    "buffer-based": "kvstream.policies.buffer_based:BufferBased",
    "fixed": "kvstream.policies.fixed:Fixed",
    "lowest": "kvstream.policies.fixed:Lowest",
    "highest": "kvstream.policies.fixed:Highest",
    "text": "kvstream.policies.fixed:Text",
    "random": "kvstream.policies.random_level:Random",
    "throughput": "kvstream.policies.throughput:Throughput",
    "bola": "kvstream.policies.bola:Bola",
    "mpc": "kvstream.policies.mpc:MPC",
    "robust-mpc": "kvstream.policies.mpc:RobustMPC",
    "chance": "kvstream.policies.chance:Chance",
    "kvstream": "kvstream.policies.kvstream:KVStream",
    "kvstream+replace": "kvstream.policies.replacing:Replacing",
    "cake": "kvstream.policies.cake:Cake",
    "hicache": "kvstream.policies.hicache:HiCache",
    "oracle": "kvstream.policies.oracle:Oracle",
}
"""Name to `module:class`; imported when first asked for."""


def names() -> list[str]:
    """Every known policy, plug-ins included."""
    return sorted({*POLICIES, *_plug_ins()})


def policy_class(name: str) -> type[Any]:
    """The class behind a name or a `./file.py:Class`. Raises PolicyError listing the valid names."""
    if name in POLICIES:
        module, _, attribute = POLICIES[name].partition(":")
        found: Any = getattr(import_module(module), attribute)
    elif ".py:" in name:
        found = class_from_file(name, "policy", "choose")
    elif name in (plug_ins := _plug_ins()):
        try:
            found = plug_ins[name].load()
        except Exception as error:
            raise PolicyError(
                f"policy plug-in {name!r} ({plug_ins[name].value}) cannot be imported: {error}"
            ) from error
    else:
        raise PolicyError(_unknown(name))
    if not (isinstance(found, type) and callable(getattr(found, "choose", None))):
        raise PolicyError(f"policy {name!r} is {found!r}; it must be a class with a method choose(obs)")
    return found


def _unknown(name: str) -> str:
    otherwise = f"choose from {', '.join(names())}, or give ./file.py:Class"
    return f"unknown policy {brief(name)}; {nearest(name, names(), otherwise)}"


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
            raise PolicyError(f"policy {name} has no setting {brief(key)}; {nearest(key, known)}")
    try:
        policy: Policy = cls(**given)
    except PolicyError:
        raise
    except (Exception, SystemExit) as error:  # a student's constructor may raise anything
        raise PolicyError(f"policy {name} cannot be built: {type(error).__name__}: {error}") from error
    return policy


def is_clairvoyant(policy: object) -> bool:
    """Whether the policy (or its class) sees the future trace."""
    return bool(getattr(policy, "clairvoyant", False))


def class_from_file(name: str, what: str, method: str) -> Any:
    """What `./file.py:Class` names; `what` and `method` say in errors what it should have been. Raises PolicyError."""
    path_text, _, attribute = name.rpartition(":")
    path, where = Path(path_text), plain(path_text)
    if not is_file(path_text):
        raise PolicyError(f"{what} file {where} does not exist; give ./file.py:Class")
    source = path.read_bytes()
    digest = hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:16]
    module_name = f"kvstream_policy_{digest}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up while the class is made
        try:
            # not by its loader: that takes kept bytecode of a file of the same size and second for this one's
            exec(compile(source, path, "exec"), module.__dict__)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a student's file raises
            del sys.modules[module_name]
            raise PolicyError(f"{what} file {where} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and callable(getattr(v, method, None))]
        raise PolicyError(f"{what} file {where} has no class {brief(attribute)}; it has {', '.join(classes) or 'none'}")
    return getattr(module, attribute)


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
