"""A student's file: finding the policy class in it, and recording what the policy sees and answers."""

from __future__ import annotations

import ast
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from kvstream.policies.api import Choice, Observation, Policy, Progress
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.errors import SpecError
from kvstream.testbed.lab.situation import Asked
from kvstream.testbed.session.ask import (
    ASK_DIRECTLY,
    Ask,
    OwnTime,
    ProgressPolicy,
    TimedAsk,
    as_level,
    ask_for,
    check_reason,
)

MAX_LINES = 60


def spec_of(text: str) -> str:
    """`./policy.py`, `policy.py,careful=0.7`, `policy.py:Mine` or a known policy's name, to a full policy spec.

    A file without a class takes the only class in it that has a method choose. The file is not executed.
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
        raise PolicyError(
            f"{file} does not exist; kvstream policy new NAME, or kvstream lab start DIR, writes one to start from"
        ) from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PolicyError(f"{file} is not valid Python: {error}") from None
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
    """Lines of a policy's file; None for a built-in policy."""
    path = Path(re.sub(r"(\.py)(:\w+)?(,.*)?$", r"\1", spec))
    return len(path.read_text(encoding="utf-8").splitlines()) if path.suffix == ".py" else None


def make(spec: str) -> Policy:
    """A fresh policy. Raises PolicyError or SpecError."""
    policy = make_policy(spec)
    if getattr(policy, "clairvoyant", False):
        raise SpecError(
            f"policy {spec} is clairvoyant: it sees the future trace; the lab compares with the oracle anyway"
        )
    return policy


@dataclass
class Watch:
    """Asks a policy during one session and records observations and answers."""

    asked: list[Asked] = field(default_factory=list)
    first_fault: str = ""
    """Traceback of the first exception, or the message that an answer was late."""
    _ask: Ask = ASK_DIRECTLY

    def choose(self, policy: Policy, obs: Observation) -> Choice:
        if not self.asked:
            self._ask = ask_for(policy)
        own = OwnTime()
        try:
            choice = self._ask.choose(policy, obs)
        except Exception as error:
            late = isinstance(error, PolicyError)  # whose message is enough
            self.first_fault = self.first_fault or (str(error) if late else traceback.format_exc(limit=-3))
            self.asked.append(Asked(obs, 0, {}, self._took_s(own)))
            raise
        seconds = self._took_s(own)
        level = as_level(choice.level, obs.n_levels) if isinstance(choice, Choice) else None
        reason = {} if level is None else check_reason(choice.reason)[0]
        self.asked.append(Asked(obs, level or 0, reason, seconds))
        return choice

    def _took_s(self, own: OwnTime) -> float:
        """What the last choice took by itself, in whichever thread it was made."""
        return self._ask.own_s if isinstance(self._ask, TimedAsk) else own.seconds

    def progress(self, policy: ProgressPolicy, obs: Observation) -> Progress:
        return self._ask.progress(policy, obs)
