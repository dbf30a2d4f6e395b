"""The bars of benchmarks/parity.py can be missed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.parity import judge


def unit(
    late_s: float,
    *,
    part: float = 0.0,
    drops: int = 0,
    status: str = "ok",
    decided_s: float = 0.0,
    estimate_bps: float | None = 10e6,
) -> dict[str, Any]:
    """Twenty chunks on a link of 10 Mbit/s: how late they arrive and are chosen over the link, and on what."""
    simulated = [0.1 * i for i in range(1, 21)]
    emulated = [t * (1.0 + part) + late_s for t in simulated]

    def choices(after_s: float, bps: float | None) -> list[dict[str, float]]:
        estimate = {} if bps is None else {"link_bps": bps}
        return [{"request_s": t - 0.1 + after_s, "first_byte_s": t - 0.09} | estimate for t in simulated]

    return {
        "status": status,
        "drops": drops,
        "emulated_s": emulated,
        "simulated_s": simulated,
        "levels": [1] * 20,
        "link_bps": [10e6] * 20,
        "emulated": choices(decided_s, estimate_bps),
        "simulated": choices(0.0, 10e6),
    }


@pytest.mark.parametrize(
    ("units", "ok"),
    [
        ([unit(0.004)], True),
        ([unit(0.0, part=0.02)], True),
        ([unit(0.0, part=0.05)], False),
        ([unit(0.0), unit(0.0), unit(0.5)], False),
        ([unit(0.0), unit(0.5, drops=3)], True),
        ([unit(0.5, drops=3)], False),
        ([unit(0.0, status="invalid")], False),
        ([unit(0.0, decided_s=0.008)], True),
        ([unit(0.0, decided_s=0.012)], False),
        ([unit(0.0, estimate_bps=11e6)], True),
        ([unit(0.0, estimate_bps=13e6)], False),
        ([unit(0.0), unit(0.0, estimate_bps=None)], False),
    ],
    ids=[
        "late but within 5 ms",
        "2 %",
        "5 % at the median",
        "a third far off",
        "drops apart",
        "only drops",
        "none",
        "chosen 8 ms later",
        "chosen 12 ms later",
        "a tenth more than the link",
        "more than the link ever had",
        "blind",
    ],
)
def test_bars(units, ok):
    assert judge(units)["ok"] is ok
