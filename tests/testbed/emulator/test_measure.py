"""What `kvstream trace replay` says of a replay, on replays made up here."""

from __future__ import annotations

import pytest

from kvstream.testbed import cli
from kvstream.testbed.emulator import measure, sandbox
from kvstream.testbed.emulator.fidelity import judge
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.measure import Measurement
from kvstream.testbed.emulator.record import LinkRecord, Sample
from kvstream.traces.trace import Trace

TRACE = Trace("steady", [1.0], [20e6])


def measured(*, factor: float = 1.0, backlog: int = 1 << 30, shares_bps: tuple[float, ...] = (19e6,)) -> Measurement:
    """A second of a link that delivers `factor` of the trace, with so much waiting at it all the time."""
    samples = tuple(Sample(t / 100, 20e6, round(25_000 * t * factor), backlog, 0) for t in range(101))
    record = LinkRecord(0.0, 1.0, samples, (), (), 2, 1514, (), {})
    share = sum(shares_bps) / 20e6 if shares_bps else None
    return Measurement("steady", LinkSettings(), record, judge(record, TRACE), shares_bps, share)


@pytest.mark.parametrize(
    ("result", "status", "says"),
    [
        (measured(), 0, "valid"),
        (measured(factor=0.5), 3, "invalid: bytes per window: median error 50.0% (limit 3.0%)"),
        (measured(backlog=0), 0, "nothing to judge: the link was never full"),
        (measured(backlog=0, shares_bps=()), 0, "nothing to judge: the link was never full; --measure fills it"),
    ],
)
def test_the_verdict_is_the_last_line_and_the_exit_status(result, status, says, monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "inside", lambda: True)
    monkeypatch.setattr(measure, "replay", lambda *given, **settings: result)
    assert cli.main(["trace", "replay", "steady"]) == status
    assert capsys.readouterr().out.splitlines()[-1].partition(";")[0] == says.partition(";")[0]
    assert result.text().splitlines()[-1].startswith(says)
    assert cli.main(["trace", "replay", "steady", "--json"]) == status


def test_receivers_that_share_a_link_are_told_apart():
    assert "\none TCP flow got 19.00 Mbit/s of goodput, 95.0% of" in measured().text()
    several = measured(shares_bps=(12e6, 7e6))
    assert "\n2 TCP flows, a receiver each, got 12.00 + 7.00 = 19.00 Mbit/s of goodput, 95.0% of" in several.text()
    assert several.to_json()["shares_bps"] == [12e6, 7e6]
    assert several.to_json()["goodput_bps"] == 19e6


def test_receivers_need_something_to_receive(capsys):
    assert cli.main(["trace", "replay", "steady", "--receivers", "2"]) == 2
    assert "--receivers needs --measure" in capsys.readouterr().err
