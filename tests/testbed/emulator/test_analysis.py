"""What captures say, from packets written by hand."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvstream.testbed.emulator import analysis
from kvstream.testbed.emulator.capture import ACK, RST, Capture
from kvstream.testbed.emulator.record import LinkRecord, Sample
from kvstream.testbed.emulator.sniff import PCAP_HEADER

SENDER, OTHER, RECEIVER = "10.1.0.1", "10.1.1.1", "10.2.0.2"
BASE = (1 << 32) - 2000
"""Sequence numbers start just before they wrap."""


def data(t_s: float, at: int, size: int = 1000, sender: str = SENDER) -> tuple[float, bytes, int]:
    return frame(t_s, sender, RECEIVER, 8700, 4000, BASE + at, 1, ACK, size)


def ack(t_s: float, upto: int, flags: int = ACK, sender: str = SENDER) -> tuple[float, bytes, int]:
    return frame(t_s, RECEIVER, sender, 4000, 8700, 1, BASE + upto if flags & ACK else 0, flags, 0)


def frame(
    t_s: float, source: str, target: str, port: int, peer: int, sequence: int, acknowledged: int, flags: int, size: int
) -> tuple[float, bytes, int]:
    """(time, the 54 bytes of headers that a capture keeps, bytes on the wire)."""
    addresses = b"".join(bytes(map(int, address.split("."))) for address in (source, target))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40 + size, 0, 0, 64, 6, 0) + addresses
    tcp = struct.pack("!HHIIBBHHH", port, peer, sequence % (1 << 32), acknowledged % (1 << 32), 0x50, flags, 0, 0, 0)
    return t_s, bytes(12) + b"\x08\x00" + ip + tcp, 54 + size


Frames = Sequence[tuple[float, bytes, int]]


def recorded(folder: Path, sender: Frames, receiver: Frames, other: Frames = (), dropped: int | None = 0):
    captures = {}
    for end, frames in (("sender0", sender), ("sender1", other), ("receiver0", receiver)):
        body = [PCAP_HEADER]
        for t_s, head, wire in frames:
            body += [struct.pack("=IIII", int(t_s), round(t_s % 1 * 1e9), len(head), wire), head]
        (folder / f"{end}.pcap").write_bytes(b"".join(body))
        captures[end] = Capture(folder / f"{end}.pcap", 0.0, dropped)
    return analysis.analyse(captures, [SENDER, OTHER])


def test_round_trips_and_one_way_delays_across_the_wrap(tmp_path):
    sent = [data(1.0, 0), data(1.001, 1000), data(1.002, 2000), ack(1.021, 2000), ack(1.024, 3000)]
    found = recorded(tmp_path, sent, [data(1.010, 0), data(1.012, 1000), data(1.014, 2000)])
    assert found.rtt_s.tolist() == pytest.approx([0.020, 0.022])
    assert found.one_way_s.tolist() == pytest.approx([0.010, 0.011, 0.012])
    assert found.new_bytes.tolist() == [1000] * 3
    assert (found.sent_bytes, found.retransmitted_bytes) == (3000, 0)
    assert found.goodput_bps(1.0, 2.0) == 24_000


def test_every_sender_s_data_counts(tmp_path):
    other = [data(1.001, 0, sender=OTHER), ack(1.031, 1000, sender=OTHER)]
    arrived = [data(1.010, 0), data(1.016, 0, sender=OTHER)]
    found = recorded(tmp_path, [data(1.0, 0), ack(1.021, 1000)], arrived, other)
    assert found.one_way_s.tolist() == pytest.approx([0.010, 0.015])
    assert sorted(found.rtt_s.tolist()) == pytest.approx([0.021, 0.030])
    assert (found.sent_bytes, found.new_bytes.tolist()) == (2000, [1000, 1000])


@pytest.mark.parametrize(("dropped", "every", "ok"), [(0, 0, True), (1, 3, False), (None, None, False)])
def test_a_capture_is_ok_only_if_nothing_is_known_to_be_missing(dropped, every, ok, tmp_path):
    found = recorded(tmp_path, [data(1.0, 0)], [data(1.01, 0)], dropped=dropped)
    assert found.dropped == every
    record = LinkRecord(1.0, 1.0, (Sample(0.0, 1e6, 0, 0, 0), Sample(0.5, 1e6, 1054, 0, 0)), (), (), 2, 1054, (), {})
    assert found.summary(record, alone=True)["ok"] == ok


def test_a_reset_acknowledges_nothing(tmp_path):
    """Its acknowledgement field is 0, which here looks like a place beyond everything that was sent."""
    found = recorded(tmp_path, [data(1.0, 0), data(1.1, 1000), ack(1.1001, 0, RST), ack(1.2, 2000)], [])
    assert found.rtt_s.tolist() == pytest.approx([0.1])


def test_what_was_sent_twice_has_no_round_trip(tmp_path):
    sent = [data(1.0, 0), data(1.01, 1000), data(1.02, 2000), ack(1.04, 1000), data(1.3, 1000), ack(1.31, 3000)]
    sent += [data(1.4, 3000), ack(1.42, 4000)]
    found = recorded(tmp_path, sent, [data(1.02, 0), data(1.03, 2000), data(1.32, 1000)])
    assert found.rtt_s.tolist() == pytest.approx([0.04, 0.02])
    assert (found.retransmitted_bytes, found.again_at_s.tolist()) == (1000, [1.3])
    # what fills a hole is new, and its delay counts from the sending that came through
    assert found.new_bytes.tolist() == [1000] * 3
    assert found.one_way_s.tolist() == pytest.approx([0.02, 0.01, 0.02])


def test_duplicates_and_overlaps_are_not_new(tmp_path):
    got = [data(1.0, 0), data(1.1, 0), data(1.2, 3000), data(1.3, 500, 3000), data(1.4, 1000, 500)]
    found = recorded(tmp_path, [], got)
    assert found.new_bytes.tolist() == [1000, 0, 1000, 2000, 0]
    assert np.isnan(found.one_way_s).all()


def test_chunks_windows_and_the_counters(tmp_path):
    sent = [data(10.0 + i / 100, 1000 * i) for i in range(50)]
    found = recorded(tmp_path, sent, [data(t_s + 0.02, 1000 * i) for i, (t_s, _, _) in enumerate(sent)])
    rows = [
        {"chunk": 0, "request_s": 0.02, "last_byte_s": 0.2},
        {"chunk": 1, "request_s": 0.1, "last_byte_s": 0.215},
        {"chunk": 2, "request_s": None, "last_byte_s": None},
    ]
    first, second, third = found.chunks(rows, 10.0)
    assert first["capture_goodput_bps"] == pytest.approx(18 * 8000 / 0.18, rel=0.06)
    assert first["capture_one_way_s"] == pytest.approx(0.02)
    # the last byte of the chunk before is where a chunk that was asked for early begins
    assert second["capture_goodput_bps"] == pytest.approx(2 * 8000 / 0.015)
    assert third == rows[2]
    assert [row["t_s"] for row in found.windows(10.0, 10.52)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    samples = tuple(Sample(t_s, 1e6, round(t_s * 100) * 1054, 0, 0) for t_s in (0.0, 0.52))
    record = LinkRecord(10.0, 0.52, samples, (), (), 2, 1054, (), {})
    summary = found.summary(record, alone=True)
    assert summary["captured_bytes"] == 50 * 1054
    assert summary["error"] == pytest.approx(-2 / 52)
    assert not summary["ok"]
    assert found.summary(record, alone=False)["ok"]


def test_sequence_numbers_wrap():
    top = (1 << 32) - 100
    assert analysis._unwrap(50, top) == (1 << 32) + 50
    assert analysis._unwrap(top - 1, (1 << 32) + 5) == top - 1
    assert math.isnan(analysis._median(np.array([float("nan")])))
