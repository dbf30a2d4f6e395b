"""What a request to vLLM says about its context: `kv_transfer_params`. Needs no vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from kvstream.policies.registry import POLICIES
from kvstream.testbed.config import specs
from kvstream.testbed.config.build import is_clairvoyant, make_policy
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.layout import checked_id

DEFAULT_POLICY: Final = "kvstream"
DEFAULT_DEADLINE_S: Final = 1.0


@dataclass(frozen=True)
class Wish:
    """How a request wants its context."""

    loads: bool = True
    context: str | None = None
    """Its name or id; None takes the longest that the prompt begins with."""
    policy: str = DEFAULT_POLICY
    deadline_s: float = DEFAULT_DEADLINE_S
    save_as: str | None = None


def default_wish(settings: Mapping[str, Any]) -> Wish:
    """From `kv_connector_extra_config`, which the operator wrote. Raises SpecError or PolicyError."""
    policy = str(settings.get("policy", DEFAULT_POLICY))
    make_policy(policy)
    return Wish(policy=policy, deadline_s=_deadline(settings.get("deadline_s", DEFAULT_DEADLINE_S)))


def wish_of(parameters: object, default: Wish) -> Wish:
    """From a request's `kv_transfer_params`, which may be anyone's. Raises SpecError or PolicyError.

    `{"context": NAME, "policy": POLICY, "deadline_s": SECONDS, "save_as": NAME}`, each optional; a context of null
    loads nothing. Keys of other connectors are left to them.
    """
    if parameters is None:
        return default
    if not isinstance(parameters, Mapping):
        raise SpecError(f"kv_transfer_params must be an object, not {type(parameters).__name__}")
    wish = default
    if "context" in parameters:
        context = parameters["context"]
        wish = replace(wish, loads=context is not None, context=None if context is None else _name(context))
    if "policy" in parameters:
        wish = replace(wish, policy=_policy(parameters["policy"]))
    if "deadline_s" in parameters:
        wish = replace(wish, deadline_s=_deadline(parameters["deadline_s"]))
    if parameters.get("save_as") is not None:
        wish = replace(wish, save_as=_name(parameters["save_as"]))
    return wish


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise SpecError(f"a context is called by a string, not {type(value).__name__}")
    return checked_id(value)


def _policy(value: object) -> str:
    """Only our own: a policy from a file is code, and a request must not bring any."""
    if not isinstance(value, str):
        raise SpecError(f"a policy is a string, not {type(value).__name__}")
    name = specs.parse(value, "policy").name
    if name not in POLICIES or is_clairvoyant(name):
        choices = ", ".join(known for known in POLICIES if not is_clairvoyant(known))
        raise SpecError(f"policy {name[:80]!r} is not one that a request may have; choose from {choices}")
    make_policy(value)
    return value


def _deadline(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SpecError(f"deadline_s is {value!r}; give seconds above 0")
    return float(value)
