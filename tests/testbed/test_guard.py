"""A policy that stalls must cost its own session a bounded time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from policies import registry
from policies.api import Choice, Observation, Replace
from policies.errors import PolicyError
from testbed.guard import PATIENCE_S, TimedAsk, ask_for
from testbed.session import Session, ask_directly
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
    Session(of, policy, 1.0, 1, costs(of)).poll(0.0)
    return policy.seen[0]


def test_an_answer_in_time_comes_through() -> None:
    assert TimedAsk()(Script(2), observation()) == Choice(2)


def test_what_a_policy_raises_comes_through() -> None:
    class Raises:
        def choose(self, obs: Observation) -> Choice:
            raise ZeroDivisionError("by a student")

    with pytest.raises(ZeroDivisionError, match="by a student"):
        TimedAsk()(Raises(), observation())


def test_leaving_the_process_is_a_fault_and_not_an_exit() -> None:
    class Exits:
        def choose(self, obs: Observation) -> Choice:
            sys.exit(1)

    with pytest.raises(PolicyError, match="SystemExit"):
        TimedAsk()(Exits(), observation())


def test_a_loop_is_cut_off_and_ended() -> None:
    ask, begun_s = TimedAsk(0.05), time.monotonic()
    with pytest.raises(PolicyError, match="no answer within 50 ms"):
        ask(Loops(), observation())
    assert time.monotonic() - begun_s < 0.5
    assert ask._late is not None
    ask._late.join(5.0)
    assert not ask._late.is_alive()
    assert ask(Script(1), observation()) == Choice(1)


def test_while_a_late_answer_is_worked_on_nothing_is_waited_for() -> None:
    ask, obs = TimedAsk(0.05), observation()
    with pytest.raises(PolicyError, match="no answer"):
        ask(Sleeps(), obs)
    begun_s = time.monotonic()
    with pytest.raises(PolicyError, match="still busy"):
        ask(Sleeps(), obs)
    assert time.monotonic() - begun_s < 0.04


def test_a_session_goes_on_with_the_smallest_level() -> None:
    of = even()
    s = Session(of, Loops(), 1.0, 1, costs(of), ask=TimedAsk(0.02))
    [fetch] = s.poll(0.0)
    assert fetch.level == 0  # type: ignore[union-attr]
    assert "no answer within 20 ms" in str(s._chunks[0].fault)


def test_the_progress_hook_has_the_same_limit() -> None:
    class Hangs(Script):
        def progress(self, obs: Observation) -> Replace:
            while True:
                pass

    of = even()
    s = Session(of, Hangs(1), 1.0, 1, costs(of), ask=TimedAsk(0.02))
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    s.on_bytes(0, 1000, 0.2)
    assert s.poll(0.2) == []
    assert "no answer within 20 ms" in str(s._chunks[0].fault)


def test_a_stalled_policy_does_not_keep_the_process_alive() -> None:
    code = (
        "import time\n"
        "from testbed.guard import TimedAsk\n"
        "class Stalls:\n"
        "    def choose(self, obs):\n"
        "        time.sleep(60)\n"
        "try:\n"
        "    TimedAsk(0.02)(Stalls(), None)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert "no answer within 20 ms" in done.stdout


def test_in_virtual_time_ours_are_asked_directly_and_others_with_patience() -> None:
    assert ask_for(registry.make("buffer-based")) is ask_directly
    other = ask_for(Loops())
    assert isinstance(other, TimedAsk)
    assert other.limit_s == PATIENCE_S > TimedAsk().limit_s


def test_a_policy_that_was_late_is_not_asked_again_where_nobody_waits_for_it() -> None:
    ask, seen = TimedAsk(0.05, again=False), observation()
    with pytest.raises(PolicyError, match="no answer within 50 ms"):
        ask(Loops(), seen)
    with pytest.raises(PolicyError, match="not asked again: no answer within 50 ms before"):
        ask(Script(2), seen)
