"""A time limit on policies: a student's endless loop must not hold up a session, or keep the process alive."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from policies.api import Choice, Observation, Policy
from policies.errors import PolicyError
from testbed.session import Ask, ask_directly

Answer = TypeVar("Answer")

PATIENCE_S = 1.0
"""What a choice may take where no clock runs: only an endless loop takes longer, however busy the machine is."""


def ask_for(policy: Policy) -> Ask:
    """How to ask in virtual time: our own policies directly, which is fast; any other one with patience, and no more in
    this session once that has run out."""
    return ask_directly if type(policy).__module__.startswith("policies.") else TimedAsk(PATIENCE_S, again=False)


class TimedAsk:
    """Asks a policy in a thread of its own and waits at most `limit_s`: an `Ask` for `testbed.session.Session`.

    Raises PolicyError when the answer is late, and at once while a late answer is still being worked on; whatever the
    policy itself raises comes through. A late thread is told to stop, which ends loops in Python, but not a call that
    waits outside of it; being a daemon, it never keeps the process alive. One instance serves one session; without
    `again` a policy that was late is not asked again in it.
    """

    def __init__(self, limit_s: float = 0.05, *, again: bool = True) -> None:
        self.limit_s = limit_s
        self._again = again
        self._late: threading.Thread | None = None

    def __call__(self, policy: Policy, obs: Observation) -> Choice:
        return self.call(policy.choose, obs)

    def call(self, function: Callable[[Observation], Answer], obs: Observation) -> Answer:
        """`function(obs)` within the limit; `Session` asks a policy's `progress` this way too."""
        if self._late is not None:
            if not self._again:
                raise PolicyError(f"not asked again: no answer within {self.limit_s * 1e3:g} ms before")
            if self._late.is_alive():
                raise PolicyError("the policy is still busy with an earlier question")
            self._late = None
        answers: list[Answer] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                answers.append(function(obs))
            except BaseException as error:  # raised again below, in the asking thread
                errors.append(error)

        thread = threading.Thread(target=work, name="policy", daemon=True)
        thread.start()
        thread.join(self.limit_s)
        if thread.is_alive():
            self._late = thread
            _interrupt(thread)
            raise PolicyError(f"no answer within {self.limit_s * 1e3:g} ms")
        if errors:
            if isinstance(errors[0], Exception):
                raise errors[0]
            raise PolicyError(f"{type(errors[0]).__name__} while choosing") from errors[0]
        return answers[0]


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in the thread at its next step in Python code."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
