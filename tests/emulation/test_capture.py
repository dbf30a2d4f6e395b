"""Captures agree with the counters, and a probe finds what the link is."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstream.testbed.emulator import capture
from kvstream.testbed.errors import MachineError


def test_a_capture_agrees_with_the_counters(scenario, tmp_path):
    done = scenario("captured", link="delay=5ms", folder=str(tmp_path / "packets"))
    assert done["dropped"] == [0, 0]
    assert done["captured"] == pytest.approx(done["counted"], rel=0.01)
    goodput = [window["goodput_bps"] for window in done["windows"]]
    assert goodput[7:9] == pytest.approx([40e6 * 1448 / 1514] * 2, rel=0.1)
    assert all(window["one_way_s"] >= 0.005 for window in done["windows"])
    assert {file.name for file in (tmp_path / "packets").iterdir()} == {"sender0.pcap", "receiver0.pcap"}
    first, second = done["chunks"]
    assert first["capture_goodput_bps"] == pytest.approx(20e6 * 1448 / 1514, rel=0.1)
    assert first["capture_one_way_s"] >= 0.005
    assert second == {"chunk": 1}


def test_every_sender_is_recorded(scenario, tmp_path):
    done = scenario("captured", link="delay=5ms", folder=str(tmp_path / "packets"), senders=2)
    files = {file.stem for file in (tmp_path / "packets").iterdir()}
    assert files == {"sender0", "sender1", "receiver0"}
    assert done["captured"] == pytest.approx(done["counted"], rel=0.01)
    assert done["summary"]["ok"]
    assert all(window["one_way_s"] >= 0.005 for window in done["windows"])


def test_no_round_trip_is_shorter_than_the_delay(scenario, tmp_path):
    """Recorded as an ordinary user's is, without tcpdump."""
    done = scenario("captured", link="delay=5ms", folder=str(tmp_path), recorder="sniff")
    assert done["dropped"] == [0, 0]
    assert done["captured"] == pytest.approx(done["counted"], rel=0.01)
    assert 0.010 <= done["least_rtt_s"] < 0.015


def test_losses_show_as_retransmissions(scenario, tmp_path):
    done = scenario("captured", link="delay=2ms,loss=2%,impair=nfqueue", folder=str(tmp_path))
    assert 0.005 < done["retransmitted"] < 0.08


def test_a_probe_finds_rate_and_round_trip(scenario):
    for (capacity, rtt), rate in zip(
        scenario("probed", link="delay=10ms", rates_mbps=[5, 80]), (5e6, 80e6), strict=True
    ):
        assert capacity == pytest.approx(rate, rel=0.1)
        assert 0.020 <= rtt < 0.030


def test_what_is_no_capture_is_refused(tmp_path):
    file = tmp_path / "x.pcap"
    file.write_bytes(b"not a capture")
    with pytest.raises(MachineError, match="not a capture"):
        list(capture.Capture(file, 0.0, 0).packets())
    with pytest.raises(MachineError, match="not a capture"):
        list(capture.Capture(Path("/nonexistent"), 0.0, 0).packets())
