"""What compute takes in sessions is learned from sessions."""

from __future__ import annotations

import pytest

from policies.api import TEXT
from testbed.rehearsal import RECENT, Experience, Rehearsal, Strain
from testbed.session import ChunkRecord, Costs, SessionRecord
from testbed.simulator import simulate
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


def test_nothing_seen_is_no_strain() -> None:
    assert Experience().strain("a") == Strain(1.0, 1.0, 1.0)
    assert Strain().on(ALONE) == ALONE


def test_ratios_are_learned_by_codec_and_forgotten() -> None:
    known = Experience()
    known.learn("a", ALONE, session((TEXT, 0, 1, 1), 2.0, 1.5), 0.1)
    known.learn("b", ALONE, session((0, 0, 0, 1), 3.0, 9.0), 0.1)
    assert known.strain("a") == Strain(pytest.approx(2.0), pytest.approx(1.5), pytest.approx(2.0))
    assert known.strain("b") == Strain(pytest.approx(3.0), pytest.approx(1.5), pytest.approx(2.0))
    for _ in range(RECENT):
        known.learn("a", ALONE, session((0, 1, 0, 1), 1.0, 9.0), 0.05)
    assert known.strain("a") == Strain(pytest.approx(1.0), pytest.approx(1.5), pytest.approx(1.0))


def test_a_strain_lengthens_each_kind_of_step() -> None:
    costs = Strain(2.0, 3.0, 4.0).on(ALONE)
    assert costs.decode_s[0] == (0.020, 0.040)
    assert costs.recompute_s == pytest.approx((0.3, 0.6, 0.9, 1.2))
    assert costs.prefill_s == pytest.approx(0.2)
    without = Strain(2.0, 3.0, 4.0).on(Costs(ALONE.decode_s, None, 0.05))
    assert without.recompute_s is None


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_rehearsal_shows_every_kind_of_step(chunks: int) -> None:
    manifest = made.even(chunks)
    costs = made.costs(manifest)
    record = simulate(manifest, Rehearsal(), made.constant(1e7), deadline_s=60.0, costs=costs)
    known = Experience()
    known.learn("a", costs, record, costs.prefill_s)
    assert record.policy_faults == 0
    assert any(level != TEXT for level in record.levels)
    assert (TEXT in record.levels) == (chunks > 1)
    assert known.strain("a") == Strain(pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0))
