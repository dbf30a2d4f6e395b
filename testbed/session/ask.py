"""How a policy is asked: directly, or with a time limit, since a student's endless loop must not hold up a session or
keep the process alive."""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import reprlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, Protocol, TypeVar, runtime_checkable

from kvstream.policies.api import TEXT, Choice, Forecast, LevelOrText, Observation, Policy, Progress
from kvstream.policies.errors import PolicyError
from kvstream.testbed.errors import SpecError

Answer = TypeVar("Answer")

MAX_REASONS: Final = 16
MAX_NAME: Final = 64
IMPORT_S: Final = 60.0
"""What an import within a choice may take in virtual time."""
PATIENCE_S: Final = 1.0
"""Time limit for a choice in virtual time: only an endless loop takes longer, however busy the machine is."""


@runtime_checkable
class ProgressPolicy(Protocol):
    """A policy that may give up a chunk in flight."""

    def choose(self, obs: Observation) -> Choice: ...

    def progress(self, obs: Observation) -> Progress: ...


class Ask(Protocol):
    """Puts a session's questions to its policy. Whatever the policy raises comes through."""

    def choose(self, policy: Policy, obs: Observation) -> Choice:
        """The policy's choice of the next chunk and level."""

    def progress(self, policy: ProgressPolicy, obs: Observation) -> Progress:
        """What the policy does about the chunk in flight."""


class DirectAsk:
    """Calls the policy in the caller's thread, for as long as it takes."""

    def choose(self, policy: Policy, obs: Observation) -> Choice:
        return policy.choose(obs)

    def progress(self, policy: ProgressPolicy, obs: Observation) -> Progress:
        return policy.progress(obs)


ASK_DIRECTLY: Final = DirectAsk()


class OwnTime:
    """A stopwatch for this thread, which stops while others have the processors: what work takes on an idle machine.

    Sleeping counts. Where the kernel does not tell how long a thread has waited (it does on Linux), only its processor
    time counts.
    """

    def __init__(self) -> None:
        self._waited_s = _waited_s()
        self._begun_s = self._now_s()

    @property
    def seconds(self) -> float:
        """Since this object was made, by the thread that made it."""
        passed_s = self._now_s() - self._begun_s
        if self._waited_s is None:
            return passed_s
        return max(0.0, passed_s - ((_waited_s() or 0.0) - self._waited_s))

    def _now_s(self) -> float:
        return time.thread_time() if self._waited_s is None else time.perf_counter()


def _waited_s() -> float | None:
    """How long this thread has been ready to run and waited for a processor, since it began; None if unknown."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


class TimedAsk:
    """Asks a policy in a thread of its own and waits at most `limit_s`.

    Raises PolicyError when the answer is late, and at once while a late call is still running; whatever the policy
    itself raises comes through. A late thread is asked to stop, which ends loops in Python, but not a call that blocks
    outside of it, and is not asked in the middle of an import; as a daemon, it never keeps the process alive. One
    instance serves one session; without `again`, a policy that was late once is not asked again.
    """

    def __init__(self, limit_s: float = 0.05, *, again: bool = True, import_s: float = 0.0) -> None:
        self.limit_s = limit_s
        self._import_s = import_s
        self.late: threading.Thread | None = None
        """The thread of the last call, if it was late."""
        self.own_s = 0.0
        """What the last call took by itself; the limit if it was late."""
        self._again = again

    def choose(self, policy: Policy, obs: Observation) -> Choice:
        return self._call(policy.choose, obs)

    def progress(self, policy: ProgressPolicy, obs: Observation) -> Progress:
        return self._call(policy.progress, obs)

    def _call(self, function: Callable[[Observation], Answer], obs: Observation) -> Answer:
        if self.late is not None:
            if not self._again:
                raise PolicyError(f"not asked again: no answer within {self.limit_s * 1e3:g} ms before")
            if self.late.is_alive():
                raise PolicyError("the policy is still busy with an earlier call")
            self.late = None
        answers: list[Answer] = []
        errors: list[BaseException] = []
        taken_s: list[float] = []

        def work() -> None:
            with suppress(SystemExit):  # an interruption that comes when the answer is there already
                own = OwnTime()
                try:
                    answers.append(function(obs))
                except BaseException as error:  # raised again below, in the asking thread
                    errors.append(error)
                finally:
                    taken_s.append(own.seconds)

        thread = threading.Thread(target=work, name="policy", daemon=True)
        thread.start()
        self._wait(thread)
        self.own_s = taken_s[0] if taken_s else self.limit_s
        if thread.is_alive():
            self.late = thread
            # torn apart, an import leaves half a module behind, or ends the process when it is one of compiled code
            if not _is_importing(thread):
                _interrupt(thread)
            raise PolicyError(f"no answer within {self.limit_s * 1e3:g} ms")
        if errors:
            if isinstance(errors[0], Exception):
                raise errors[0]
            raise PolicyError(f"{type(errors[0]).__name__} while choosing") from errors[0]
        return answers[0]

    def _wait(self, thread: threading.Thread) -> None:
        """Wait for the answer; time that goes into an import does not count, up to `import_s`."""
        thread.join(self.limit_s)
        end_s = time.monotonic() + self._import_s
        while thread.is_alive() and _is_importing(thread) and time.monotonic() < end_s:
            thread.join(self.limit_s)


def ask_for(policy: Policy) -> Ask:
    """How to ask in virtual time: our own policies directly, which is fast; any other with a generous limit, and not
    again in this session once it has exceeded that."""
    return ASK_DIRECTLY if _is_ours(policy) else TimedAsk(PATIENCE_S, again=False, import_s=IMPORT_S)


def ask_in_session(policy: Policy) -> Ask:
    """How to ask in a real session: our own policies directly, since a thread for every choice takes half a millisecond
    and, where an engine keeps the interpreter busy, is late without their fault; any other within its limit."""
    return ASK_DIRECTLY if _is_ours(policy) else TimedAsk()


def _is_ours(policy: Policy) -> bool:
    return type(policy).__module__.startswith("kvstream.policies.")


def check_choice(choice: object, obs: Observation) -> tuple[LevelOrText, int]:
    """(level, chunk) of an answer, any integers as `int`. Raises PolicyError unless it can be carried out."""
    if not isinstance(choice, Choice):
        raise PolicyError(f"choose returned {shown(choice)}; return Choice(level)")
    level = as_level(choice.level, obs.n_levels)
    if level is None:
        raise PolicyError(f"level {shown(choice.level)} was chosen; give 0 to {obs.n_levels - 1} or TEXT")
    if level == TEXT and obs.recompute_s is None:
        raise PolicyError("text was chosen although recompute_s is None: this receiver has no model")
    if choice.chunk is None:
        return level, obs.chunk
    chunk = _integer(choice.chunk)
    if chunk not in obs.remaining:
        raise PolicyError(f"chunk {shown(choice.chunk)} was chosen; remaining are {shown(obs.remaining)}")
    return level, chunk


def as_level(level: object, n_levels: int) -> LevelOrText | None:
    """A level as `int` or TEXT, whichever integer it is: any `argmax` gives one of NumPy's. None if it is none."""
    if isinstance(level, str):
        return TEXT if level == TEXT else None
    number = _integer(level)
    return number if 0 <= number < n_levels else None


def check_reason(reason: object) -> tuple[dict[str, float], str | None]:
    """What of a choice's reason can be shown, and what is wrong with the rest: numbers by name, MAX_REASONS at most."""
    if not isinstance(reason, (dict, Mapping)):
        return {}, f"reason is {shown(reason)}; give a dict of names and numbers"
    taken: dict[str, float] = {}
    fault = None
    for key, value in itertools.islice(reason.items(), MAX_REASONS):
        number = value if type(value) is float else _number(value)
        if isinstance(key, str) and len(key) <= MAX_NAME and math.isfinite(number):
            taken[key] = number
        else:
            fault = f"reason[{shown(key)}] is not a number: {shown(value)}"
    if len(reason) > MAX_REASONS:
        fault = f"reason has {len(reason)} entries; {MAX_REASONS} are kept"
    return taken, fault


def _number(value: object) -> float:
    """As `float`; nan for what is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except Exception:  # a policy's object may raise anything
        return math.nan


def _integer(value: object) -> int:
    """As `int`; -1 for what is no integer."""
    if type(value) is int:
        return value
    try:
        return -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except Exception:  # a policy's object may raise anything
        return -1


def fault_of(error: Exception) -> str:
    """What a policy raised, in one line of bounded length."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {' '.join(words.split())[:300]}"


def shown(value: object) -> str:
    """For a message: short, whatever it is."""
    try:
        return reprlib.repr(value)[:80]
    except Exception:
        return f"a {type(value).__name__}"


def give_forecast(policy: Policy, forecast: Forecast | None) -> None:
    """Show a clairvoyant policy the future; any other policy sees nothing. Raises SpecError without a forecast."""
    if getattr(policy, "clairvoyant", False):
        if forecast is None:
            raise SpecError(f"policy {type(policy).__name__} is clairvoyant; it needs a forecast")
        policy.foresee(forecast)  # type: ignore[attr-defined]


def _is_importing(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in the thread at its next step in Python code."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
