"""The state machine, fed by hand: what work it gives, in which order, and what a policy sees."""

from __future__ import annotations

from typing import Any

import pytest

from kvstream.policies.api import CANCEL, KEEP, TEXT, Choice, Observation, Replace
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.session.session import MAX_ATTEMPTS, Session
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.session.work import PREFILL, Cancel, Decode, Fetch, Prefill, Recompute
from kvstream.testbed.store.manifest import Manifest
from tests.testbed.made import Script, costs, even


def session(
    policy: Any, of: Manifest | None = None, depth: int = 1, rtt_s: float | None = None, **settings: Any
) -> Session:
    of = of or even()
    return Session(of, policy, SessionSettings(1.0, depth, **settings), costs(of), rtt_s=rtt_s)


def arrive(s: Session, chunk: int, first_s: float, last_s: float) -> None:
    s.on_first_byte(chunk, first_s)
    s.on_last_byte(chunk, last_s)


def test_depth_1_chooses_when_a_chunk_has_arrived_and_decodes_beside_it() -> None:
    s = session(Script(1))
    assert s.poll(0.1) == [Fetch(0, 1, 200_000)]
    assert s.poll(0.2) == []
    assert s.wake_s() is None
    arrive(s, 0, 0.2, 0.3)
    assert s.poll(0.3) == [Fetch(1, 1, 200_000), Decode(0, 1)]
    arrive(s, 1, 0.3, 0.4)
    assert s.poll(0.4) == [Fetch(2, 1, 200_000)]  # the decoder is still busy
    s.on_computed(0, 0.3, 0.45)
    assert s.poll(0.45) == [Decode(1, 1)]


def test_a_whole_session_gives_a_record() -> None:
    s = session(Script(0, TEXT, 2, 1))
    now_s = 0.0
    assert isinstance(s.poll(now_s)[0], Fetch)
    for chunk in range(4):
        arrive(s, chunk, now_s + 0.01, now_s + 0.1)
        now_s += 0.1
        step = s.poll(now_s)[-1]
        assert step == (Recompute(1) if chunk == 1 else Decode(chunk, (0, 0, 2, 1)[chunk]))
        s.on_computed(chunk, now_s, now_s + 0.02)
    assert s.poll(now_s + 0.02) == [Prefill()]
    assert not s.done
    with pytest.raises(SessionFailed):
        s.record()
    s.on_computed(PREFILL, now_s + 0.02, now_s + 0.05)
    record = s.record()
    assert record.ttft_s == pytest.approx(0.45)
    assert record.met
    assert record.levels == (0, TEXT, 2, 1)
    assert record.distortion == pytest.approx((0.1 + 0.0 + 0.025 + 0.05) / 4)
    assert record.bytes == 100_000 + 400 + 400_000 + 200_000
    assert record.wasted_bytes == 0
    assert [c.request_s for c in record.chunks] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_text_waits_for_everything_before_it_while_later_chunks_are_decoded() -> None:
    s = session(Script(1, Choice(TEXT, chunk=2), Choice(1, chunk=1), 1), even(4))
    s.poll(0.0)
    arrive(s, 0, 0.0, 0.1)
    assert s.poll(0.1) == [Fetch(2, TEXT, 400), Decode(0, 1)]
    arrive(s, 2, 0.1, 0.2)
    s.on_computed(0, 0.1, 0.2)
    assert s.poll(0.2) == [Fetch(1, 1, 200_000)]  # nothing to compute: chunk 1 is missing
    arrive(s, 1, 0.2, 0.3)
    assert s.poll(0.3) == [Fetch(3, 1, 200_000), Decode(1, 1)]
    s.on_computed(1, 0.3, 0.4)
    assert s.poll(0.4) == [Recompute(2)]


def test_depth_2_looks_ahead_when_the_rest_takes_a_round_trip() -> None:
    s = session(Script(1), depth=2, rtt_s=0.05)
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    assert s.poll(0.1) == []
    s.on_bytes(0, 20_000, 0.12)  # 1 MB/s: 200 kB take 0.2 s, so the rest takes 0.18 s
    assert s.poll(0.12) == []
    assert s.wake_s() == pytest.approx(0.12 + 0.18 - 0.055)
    assert s.poll(0.24) == []
    assert s.poll(0.246) == [Fetch(1, 1, 200_000)]
    assert s.in_flight == (0, 1)
    assert s.wake_s() is None
    s.on_bytes(0, 190_000, 0.29)
    assert s.poll(0.29) == []  # two are in flight, a third has to wait
    s.on_last_byte(0, 0.3)
    assert s.poll(0.3) == [Decode(0, 1)]  # chunk 1 has not shown its rate yet
    assert s.in_flight == (1,)


def test_a_policy_that_knows_the_link_is_asked_as_soon_as_the_first_frame_is_here() -> None:
    class Knowing(Script):
        clairvoyant = True

    s = session(Knowing(1), depth=2, rtt_s=0.05)
    s.poll(0.0)
    assert s.poll(0.09) == []
    s.on_first_byte(0, 0.1)
    assert s.poll(0.1) == [Fetch(1, 1, 200_000)]
    s.on_bytes(0, 20_000, 0.12)
    assert s.poll(0.12) == []  # two are in flight


def test_depth_2_chooses_on_the_last_byte_at_the_latest() -> None:
    s = session(Script(1), depth=2, rtt_s=0.05)
    s.poll(0.0)
    arrive(s, 0, 0.1, 0.11)
    assert s.poll(0.11) == [Fetch(1, 1, 200_000), Decode(0, 1)]


def test_without_overlap_all_compute_waits_for_the_last_byte() -> None:
    s = session(Script(1), even(2), overlap=False)
    s.poll(0.0)
    arrive(s, 0, 0.0, 0.1)
    assert s.poll(0.1) == [Fetch(1, 1, 200_000)]
    arrive(s, 1, 0.1, 0.2)
    assert s.poll(0.2) == [Decode(0, 1)]
    s.on_computed(0, 0.2, 0.21)
    assert s.poll(0.21) == [Decode(1, 1)]


def test_the_first_observation_is_complete_and_has_no_history() -> None:
    policy = Script(0)
    s = session(policy, even(3), rtt_s=0.02, prior_bps=5e6, concurrent=3, seed=9)
    s.poll(0.03)
    obs = policy.seen[0]
    assert (obs.chunk, obs.n_chunks, obs.now_s, obs.deadline_s) == (0, 3, 0.03, 1.0)
    assert obs.remaining == (0, 1, 2)
    assert obs.tokens == (100, 100, 100)
    assert obs.sizes_bytes == ((100_000, 200_000, 400_000),) * 3
    assert obs.distortion == ((0.1, 0.05, 0.025),) * 3
    assert obs.text_bytes == (400,) * 3
    assert obs.recompute_s == (0.1,) * 3
    assert obs.decode_s == ((0.01,) * 3,) * 3
    assert (obs.transfers, obs.in_flight, obs.compute_backlog_s) == ((), (), 0.0)
    assert (obs.rtt_s, obs.prior_bps, obs.concurrent, obs.seed, obs.prefill_s) == (0.02, 5e6, 3, 9, 0.02)
    assert obs.n_levels == 3
    assert obs.left_s == pytest.approx(0.97)


def test_tables_follow_the_remaining_chunks_when_a_policy_reorders() -> None:
    policy = Script(Choice(0, chunk=1), 0)
    of = even(3)
    s = session(policy, of)
    s.poll(0.0)
    arrive(s, 1, 0.0, 0.1)
    s.poll(0.1)
    obs = policy.seen[1]
    assert obs.remaining == (0, 2)
    assert obs.chunk == 0
    assert len(obs.sizes_bytes) == len(obs.decode_s) == len(obs.tokens) == len(obs.distortion) == 2


def test_goodput_leaves_out_the_time_spent_behind_the_previous_chunk() -> None:
    policy = Script(1)
    s = session(policy, depth=2, rtt_s=0.05)
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    s.on_bytes(0, 150_000, 0.25)
    assert s.poll(0.25) == [Fetch(1, 1, 200_000)]
    s.on_last_byte(0, 0.3)
    s.poll(0.3)
    arrive(s, 1, 0.3, 0.5)
    s.poll(0.5)
    first, second = policy.seen[-1].transfers
    assert first.goodput_bps == pytest.approx(200_000 * 8 / 0.3)
    assert second.goodput_bps == pytest.approx(200_000 * 8 / 0.2)


def test_backlog_counts_waiting_computing_and_in_flight_chunks() -> None:
    policy = Script(1)
    s = session(policy, even(3))
    s.poll(0.0)
    arrive(s, 0, 0.0, 0.1)
    s.poll(0.1)
    assert policy.seen[-1].compute_backlog_s == pytest.approx(0.01)
    arrive(s, 1, 0.1, 0.104)
    s.poll(0.104)
    assert policy.seen[-1].compute_backlog_s == pytest.approx(0.01 + 0.006)


class Raises:
    def choose(self, obs: Observation) -> Choice:
        raise ZeroDivisionError("by a student")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Raises(), "ZeroDivisionError: by a student"),
        (Script(7), "level 7 was chosen; give 0 to 2 or TEXT"),
        (Script(-1), "level -1"),
        (Script(True), "level True"),
        (Script(1.5), "level 1.5"),  # type: ignore[arg-type]
        (Script(Choice(0, chunk=99)), "chunk 99"),
    ],
)
def test_a_faulty_answer_becomes_the_smallest_level_and_is_recorded(policy: Any, words: str) -> None:
    s = session(policy)
    assert s.poll(0.0) == [Fetch(0, 0, 100_000)]
    fault = s.chunks[0].fault
    assert fault is not None
    assert words in fault


def test_an_answer_that_is_not_a_choice_is_a_fault() -> None:
    class Wrong:
        def choose(self, obs: Observation) -> int:
            return 1

    s = session(Wrong())
    s.poll(0.0)
    assert "return Choice(level)" in str(s.chunks[0].fault)


def test_text_without_a_model_is_a_fault() -> None:
    of = even()
    s = Session(of, Script(TEXT), SessionSettings(1.0, depth=1), costs(of, recompute_s=None))
    assert s.poll(0.0) == [Fetch(0, 0, 100_000)]
    assert "no model" in str(s.chunks[0].fault)


def test_a_damaged_chunk_is_fetched_again_and_its_bytes_are_waste() -> None:
    s = session(Script(1), even(2))
    s.poll(0.0)
    arrive(s, 0, 0.0, 0.1)
    assert s.poll(0.1) == [Fetch(1, 1, 200_000), Decode(0, 1)]
    s.on_failed(0, "checksum", 0.12)
    arrive(s, 1, 0.1, 0.2)
    assert s.poll(0.2) == [Fetch(0, 1, 200_000), Decode(1, 1)]
    arrive(s, 0, 0.2, 0.3)
    s.on_computed(1, 0.2, 0.25)
    assert s.poll(0.3) == [Decode(0, 1)]
    s.on_computed(0, 0.3, 0.31)
    assert s.poll(0.31) == [Prefill()]
    s.on_computed(PREFILL, 0.31, 0.33)
    record = s.record()
    assert record.wasted_bytes == 200_000
    assert record.chunks[0].attempts == 2
    assert record.bytes == 400_000


def test_a_chunk_that_stays_damaged_fails_the_session() -> None:
    s = session(Script(1), even(1))
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert s.poll(attempt)[0] == Fetch(0, 1, 200_000)
        arrive(s, 0, attempt, attempt + 0.5)
        assert s.poll(attempt + 0.5) == [Decode(0, 1)]
        if attempt < MAX_ATTEMPTS:
            s.on_failed(0, "checksum", attempt + 0.6)
        else:
            with pytest.raises(SessionFailed, match=f"failed {MAX_ATTEMPTS} times, last: checksum"):
                s.on_failed(0, "checksum", attempt + 0.6)


def test_an_unrequested_chunk_fails_the_session() -> None:
    with pytest.raises(SessionFailed, match="arrived unrequested"):
        session(Script(1)).on_last_byte(2, 0.1)


class Watcher(Script):
    """Answers `progress` from a list."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(2)
        self.replies = list(answers)

    def progress(self, obs: Observation) -> Any:
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_progress_is_asked_after_bytes_and_may_replace_the_chunk() -> None:
    s = session(Watcher(KEEP, Replace(0)), even(2))
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    assert s.poll(0.1) == []
    s.on_bytes(0, 50_000, 0.2)
    assert s.poll(0.2) == []
    s.on_bytes(0, 60_000, 0.3)
    assert s.poll(0.3) == [Cancel(0), Fetch(0, 0, 100_000)]
    assert s.in_flight == (0,)
    arrive(s, 0, 0.4, 0.5)
    assert s.poll(0.5) == [Fetch(1, 2, 400_000), Decode(0, 0)]
    arrive(s, 1, 0.6, 0.7)
    s.on_computed(0, 0.5, 0.6)
    assert s.poll(0.7) == [Decode(1, 2)]
    s.on_computed(1, 0.7, 0.8)
    assert s.poll(0.8) == [Prefill()]
    s.on_computed(PREFILL, 0.8, 0.9)
    record = s.record()
    assert record.levels == (0, 2)
    assert record.wasted_bytes == 60_000


def test_progress_may_cancel_and_the_policy_chooses_again() -> None:
    policy = Watcher(CANCEL)
    s = session(policy, even(2))
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    s.on_bytes(0, 50_000, 0.2)
    policy.answers = [0]
    assert s.poll(0.2) == [Cancel(0), Fetch(0, 0, 100_000)]
    assert len(policy.seen) == 2


@pytest.mark.parametrize("reply", ["maybe", Replace(9), RuntimeError("oops")])
def test_a_faulty_progress_answer_keeps_the_chunk(reply: Any) -> None:
    s = session(Watcher(reply), even(2))
    s.poll(0.0)
    s.on_first_byte(0, 0.1)
    s.on_bytes(0, 50_000, 0.2)
    assert s.poll(0.2) == []
    assert s.in_flight == (0,)
    assert s.chunks[0].fault


@pytest.mark.parametrize(("deadline_s", "depth"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0), (1.0, 3)])
def test_impossible_settings_are_refused(deadline_s: float, depth: int) -> None:
    with pytest.raises(SpecError):
        SessionSettings(deadline_s, depth)


@pytest.mark.parametrize("prior_bps", [0.0, -1.0, float("nan")])
def test_a_prior_of_nothing_is_refused(prior_bps: float) -> None:
    with pytest.raises(SpecError, match="None if unknown"):
        SessionSettings(1.0, prior_bps=prior_bps)
