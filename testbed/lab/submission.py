"""A student's file: which class in it is the policy, and asking it while watching what it sees and what it costs."""

from __future__ import annotations

import ast
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from policies.api import TEXT, Choice, Observation, Policy, Progress
from policies.errors import PolicyError
from testbed.errors import SpecError
from testbed.guard import ask_for
from testbed.lab.situation import Asked
from testbed.plugs import make_policy
from testbed.session import Ask, ask_directly

MOST_LINES = 60


def spec_of(text: str) -> str:
    """`./policy.py`, `policy.py,careful=0.7`, `policy.py:Mine` or a known policy's name, to a full policy spec.

    A file without a class takes the only class in it that has a method choose. Nothing is run to find out.
    Raises PolicyError.
    """
    head, comma, settings = text.partition(",")
    if not head.endswith(".py"):
        return text
    return f"{head}:{_class_in(Path(head))}{comma}{settings}"


def _class_in(file: Path) -> str:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        raise PolicyError(f"{file} is not there; kvstream lab start DIR writes one to begin with") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PolicyError(f"{file} is not Python: {error}") from None
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(item, ast.FunctionDef) and item.name == "choose" for item in node.body)
    ]
    if not names:
        raise PolicyError(f"{file} has no class with a method choose(self, obs)")
    if len(names) > 1:
        raise PolicyError(f"{file} has {', '.join(names)}; say which, as in {file}:{names[-1]}")
    return names[0]


def lines_in(spec: str) -> int | None:
    """Lines of the file behind a policy as it was typed; None for a built-in policy."""
    path = Path(re.sub(r"(\.py)(:\w+)?(,.*)?$", r"\1", spec))
    return len(path.read_text(encoding="utf-8").splitlines()) if path.suffix == ".py" else None


def make(spec: str) -> Policy:
    """A fresh policy. Raises PolicyError or SpecError."""
    policy = make_policy(spec)
    if getattr(policy, "clairvoyant", False):
        raise SpecError(f"policy {spec} is told the future of the link; the lab compares with the oracle anyway")
    return policy


@dataclass
class Watch:
    """Asks a policy, for one session, and keeps what went by."""

    asked: list[Asked] = field(default_factory=list)
    first_fault: str = ""
    """Traceback of the first exception, or that an answer was late."""
    _ask: Ask = ask_directly

    def __call__(self, policy: Policy, obs: Observation) -> Choice:
        if not self.asked:
            self._ask = ask_for(policy)
        began = time.perf_counter()
        try:
            choice = self._ask(policy, obs)
        except Exception as error:
            late = isinstance(error, PolicyError)  # which says all there is to say
            self.first_fault = self.first_fault or (str(error) if late else traceback.format_exc(limit=-3))
            self.asked.append(Asked(obs, 0, {}, time.perf_counter() - began))
            raise
        seconds = time.perf_counter() - began
        usable = isinstance(choice, Choice) and (choice.level == TEXT or choice.level in range(obs.n_levels))
        level, reason = (choice.level, dict(choice.reason)) if usable else (0, {})
        self.asked.append(Asked(obs, level, reason, seconds))
        return choice

    def call(self, function: Callable[[Observation], Progress], obs: Observation) -> Progress:
        """A policy's `progress`, asked in the same way."""
        call = getattr(self._ask, "call", None)
        return function(obs) if call is None else call(function, obs)
