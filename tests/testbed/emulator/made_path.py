"""A path whose kernel is made up: everything above the shaper's process is real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.path import LinkPath
from kvstream.testbed.emulator.record import LinkRecord, Sample
from kvstream.traces.trace import Trace

FULL_BYTES = 1 << 30
RECORDED_S = 0.5


class MadeShaper:
    """Delivers these fractions of the trace, session by session; the last one from then on."""

    def __init__(self, *factors: float) -> None:
        self.factors = list(factors or (1.0,))
        self.settings = {"interface": "made"}
        self.steps = Path("/run/made.steps")
        self.calls: list[tuple[Any, ...]] = []
        self._trace: Trace | None = None
        self._t0_s = 0.0

    def arm(self, trace: Trace | None, t0_s: float, length_s: float, *, chunks: int = 0) -> None:
        self._trace, self._t0_s = trace, t0_s
        self.calls.append(("arm", trace, t0_s, chunks))

    def set_rate(self, rate_bps: float) -> None:
        self.calls.append(("rate", rate_bps))

    def finish(self, end_s: float) -> LinkRecord:
        self.calls.append(("finish", end_s))
        if self._trace is None or self._trace.per == "chunk":
            return LinkRecord(self._t0_s, 0.0, (), (), (), 2, 1514, (), {})
        factor = self.factors.pop(0) if len(self.factors) > 1 else self.factors[0]
        times_s = [i / 100 for i in range(int(RECORDED_S * 100) + 1)]
        samples = tuple(
            Sample(t_s, self._trace.rate_at(t_s), round(self._trace.bits_by(t_s) / 8 * factor), FULL_BYTES, 0)
            for t_s in times_s
        )
        return LinkRecord(self._t0_s, RECORDED_S, samples, (), (), 2, 1514, (), {})

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The calls of one name."""
        return [call for call in self.calls if call[0] == name]


def made_path(
    down: MadeShaper,
    up: MadeShaper | None = None,
    up_trace: Trace | None = None,
    *,
    link: LinkSettings | None = None,
    sender_ips: Sequence[str] = ("10.1.0.1",),
    **parts: Any,
) -> LinkPath:
    network = SimpleNamespace(
        link=link or LinkSettings(),
        sender_ips=list(sender_ips),
        settings={"kernel": "6.12"},
        size_packets=lambda traces: None,
    )
    return LinkPath(network, down, up, up_trace, **parts)  # type: ignore[arg-type]
