"""The bars of benchmarks/parity.py can be missed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.parity import judge


def unit(late_s: float, *, part: float = 0.0, drops: int = 0, status: str = "ok") -> dict[str, Any]:
    simulated = [0.1 * i for i in range(1, 21)]
    emulated = [t * (1.0 + part) + late_s for t in simulated]
    return {"status": status, "drops": drops, "emulated_s": emulated, "simulated_s": simulated}


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
    ],
    ids=["late but within 5 ms", "2 %", "5 % at the median", "a third far off", "drops apart", "only drops", "none"],
)
def test_bars(units, ok):
    assert judge(units)["ok"] is ok
