"""A policy that stalls costs its own session a bounded time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from kvstream.policies import registry
from kvstream.policies.api import Choice, Observation, Replace
from kvstream.policies.errors import PolicyError
from kvstream.testbed.session.ask import ASK_DIRECTLY, PATIENCE_S, TimedAsk, ask_for, ask_in_session
from kvstream.testbed.session.session import Session
from kvstream.testbed.session.settings import SessionSettings
from tests.testbed.made import Script, costs, even


class Loops:
    def choose(self, obs: Observation) -> Choice:
        while True:
            pass


class Sleeps:
    def choose(self, obs: Observation) -> Choice:
        time.sleep(0.5)
        return Choice(2)


def observation() -> Observation:
    policy, of = Script(0), even()
    Session(of, policy, SessionSettings(1.0, depth=1), costs(of)).poll(0.0)
    return policy.seen[0]


def test_an_answer_in_time_comes_through() -> None:
    assert TimedAsk().choose(Script(2), observation()) == Choice(2)


def test_exceptions_of_the_policy_come_through() -> None:
    class Raises:
        def choose(self, obs: Observation) -> Choice:
            raise ZeroDivisionError("by a student")

    with pytest.raises(ZeroDivisionError, match="by a student"):
        TimedAsk().choose(Raises(), observation())


def test_sys_exit_in_a_policy_is_a_fault() -> None:
    class Exits:
        def choose(self, obs: Observation) -> Choice:
            sys.exit(1)

    with pytest.raises(PolicyError, match="SystemExit"):
        TimedAsk().choose(Exits(), observation())


def test_an_endless_loop_is_interrupted() -> None:
    ask, begun_s = TimedAsk(0.05), time.monotonic()
    with pytest.raises(PolicyError, match="no answer within 50 ms"):
        ask.choose(Loops(), observation())
    assert time.monotonic() - begun_s < 0.5
    assert ask.late is not None
    ask.late.join(5.0)
    assert not ask.late.is_alive()
    assert ask.choose(Script(1), observation()) == Choice(1)


def test_only_strangers_have_a_limit_in_a_session() -> None:
    assert ask_in_session(registry.make("highest")) is ASK_DIRECTLY
    assert isinstance(ask_in_session(Loops()), TimedAsk)


def test_a_busy_policy_is_refused_at_once() -> None:
    ask, obs = TimedAsk(0.05), observation()
    with pytest.raises(PolicyError, match="no answer"):
        ask.choose(Sleeps(), obs)
    with pytest.raises(PolicyError, match="still busy with an earlier call"):
        ask.choose(Sleeps(), obs)


def test_a_session_goes_on_with_the_smallest_level() -> None:
    of = even()
    s = Session(of, Loops(), SessionSettings(1.0, depth=1), costs(of), ask=TimedAsk(0.02))
    [fetch] = s.poll(0.0)
    assert fetch.level == 0  # type: ignore[union-attr]
    assert "no answer within 20 ms" in str(s.chunks[0].fault)


def test_the_progress_hook_has_the_same_limit() -> None:
    class Hangs(Script):
        def progress(self, obs: Observation) -> Replace:
            while True:
                pass

    of = even()
    s = Session(of, Hangs(1), SessionSettings(1.0, depth=1), costs(of), ask=TimedAsk(0.02))
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    s.on_bytes(0, 1000, 0.2)
    assert s.poll(0.2) == []
    assert "no answer within 20 ms" in str(s.chunks[0].fault)


def test_a_stalled_policy_does_not_keep_the_process_alive() -> None:
    code = (
        "import time\n"
        "from kvstream.testbed.session.ask import TimedAsk\n"
        "class Stalls:\n"
        "    def choose(self, obs):\n"
        "        time.sleep(60)\n"
        "try:\n"
        "    TimedAsk(0.02).choose(Stalls(), None)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert "no answer within 20 ms" in done.stdout


def test_in_virtual_time_only_foreign_policies_have_a_time_limit() -> None:
    assert ask_for(registry.make("buffer-based")) is ASK_DIRECTLY
    other = ask_for(Loops())
    assert isinstance(other, TimedAsk)
    assert other.limit_s == PATIENCE_S > TimedAsk().limit_s


def test_a_late_policy_is_not_asked_again_in_virtual_time() -> None:
    ask, seen = TimedAsk(0.05, again=False), observation()
    with pytest.raises(PolicyError, match="no answer within 50 ms"):
        ask.choose(Loops(), seen)
    with pytest.raises(PolicyError, match="not asked again: no answer within 50 ms before"):
        ask.choose(Script(2), seen)
