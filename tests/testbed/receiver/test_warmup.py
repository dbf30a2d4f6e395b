"""What compute takes in sessions is learned from sessions."""

from __future__ import annotations

import pytest

from kvstream.policies.api import TEXT
from kvstream.testbed.receiver.warmup import RECENT, Experience, WarmUp
from kvstream.testbed.session.costs import Costs, Slowdown
from kvstream.testbed.session.record import ChunkRecord, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from tests.testbed import made

ALONE = Costs(((0.010, 0.020),) * 4, (0.1, 0.2, 0.3, 0.4), 0.05)


def session(levels: tuple[object, ...], decode: float, recompute: float) -> SessionRecord:
    """A session whose steps took so many times as long as alone."""
    chunks = []
    for index, level in enumerate(levels):
        assert ALONE.recompute_s is not None
        took_s = recompute * ALONE.recompute_s[index] if level == TEXT else decode * ALONE.decode_s[index][int(level)]  # type: ignore[call-overload]
        chunks.append(ChunkRecord(index, level, decode_start_s=1.0, decode_end_s=1.0 + took_s))  # type: ignore[arg-type]
    return SessionRecord(2.0, 3.0, 0.0, levels, 0, 0, 0, tuple(chunks))  # type: ignore[arg-type]


def test_without_sessions_there_is_no_slowdown() -> None:
    assert Experience().slowdown("a") == Slowdown(1.0, 1.0, 1.0)
    assert Slowdown().on(ALONE) == ALONE


def test_ratios_are_learned_by_codec_and_forgotten() -> None:
    known = Experience()
    known.learn("a", ALONE, session((TEXT, 0, 1, 1), 2.0, 1.5), 0.1)
    known.learn("b", ALONE, session((0, 0, 0, 1), 3.0, 9.0), 0.1)
    assert known.slowdown("a") == Slowdown(pytest.approx(2.0), pytest.approx(1.5), pytest.approx(2.0))
    assert known.slowdown("b") == Slowdown(pytest.approx(3.0), 1.0, pytest.approx(2.0))
    for _ in range(RECENT):
        known.learn("a", ALONE, session((0, 1, 0, 1), 1.0, 9.0), 0.05)
    assert known.slowdown("a") == Slowdown(pytest.approx(1.0), pytest.approx(1.5), pytest.approx(1.0))


def test_a_slowdown_lengthens_each_kind_of_step() -> None:
    costs = Slowdown(2.0, 3.0, 4.0).on(ALONE)
    assert costs.decode_s[0] == (0.020, 0.040)
    assert costs.recompute_s == pytest.approx((0.3, 0.6, 0.9, 1.2))
    assert costs.prefill_s == pytest.approx(0.2)
    without = Slowdown(2.0, 3.0, 4.0).on(Costs(ALONE.decode_s, None, 0.05))
    assert without.recompute_s is None


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_warm_up_shows_every_kind_of_step(chunks: int) -> None:
    manifest = made.even(chunks)
    costs = made.costs(manifest)
    record = simulate(manifest, WarmUp(), made.constant(1e7), SessionSettings(60.0), costs=costs)
    known = Experience()
    known.learn("a", costs, record, costs.prefill_s)
    assert record.policy_faults == 0
    assert any(level != TEXT for level in record.levels)
    assert (TEXT in record.levels) == (chunks > 1)
    assert known.slowdown("a") == Slowdown(pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0))
