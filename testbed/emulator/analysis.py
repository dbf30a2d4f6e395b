"""What captures at both ends say of the data between: goodput, round trips, retransmissions, one-way delays."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed.emulator.capture import ACK, RST, Capture, Flow, Packet, recorder
from kvstream.testbed.emulator.record import LinkRecord

SEQUENCES: Final = 1 << 32
WINDOW_S: Final = 0.1
RECEIVER: Final = "receiver0"
AGREEMENT: Final = 0.01
"""A capture and the queue's counters may differ by so much of the bytes."""


@dataclass(frozen=True)
class Analysis:
    """What captures say about the data from the senders to a receiver. Times are CLOCK_MONOTONIC."""

    arrival_s: NDArray[np.float64]
    """When each packet from a sender reached the receiver."""
    frame_bytes: NDArray[np.int64]
    """Its layer-2 bytes."""
    new_bytes: NDArray[np.int64]
    """Its payload that had not arrived before."""
    one_way_s: NDArray[np.float64]
    """From its (last) sending to its arrival; NaN without payload, or where the sending is not in the capture."""
    rtt_s: NDArray[np.float64]
    """Round trips at the senders: from data to the first acknowledgement of it, retransmitted data left out."""
    rtt_at_s: NDArray[np.float64]
    """When each of these acknowledgements came."""
    again_bytes: NDArray[np.int64]
    """Payload of each packet that had been sent before, of those that have some."""
    again_at_s: NDArray[np.float64]
    """When each of these was sent."""
    sent_bytes: int
    """Payload, sent again or not."""
    dropped: int | None
    """Packets that the recorders missed, all ends together; None where one did not say."""

    @property
    def retransmitted_bytes(self) -> int:
        return int(self.again_bytes.sum())

    def goodput_bps(self, begin_s: float, end_s: float) -> float:
        """Payload that arrived for the first time in a stretch of time, in bit/s."""
        inside = (self.arrival_s >= begin_s) & (self.arrival_s < end_s)
        return float(self.new_bytes[inside].sum()) * 8.0 / (end_s - begin_s)

    def frames_between(self, begin_s: float, end_s: float) -> int:
        """Layer-2 bytes that arrived in a stretch of time: comparable with the queue's counter."""
        inside = (self.arrival_s >= begin_s) & (self.arrival_s < end_s)
        return int(self.frame_bytes[inside].sum())

    def windows(self, begin_s: float, end_s: float, window_s: float = WINDOW_S) -> list[dict[str, float]]:
        """Goodput, retransmissions, and round trips and one-way delays, window by window from `begin_s`."""
        rows = []
        for start_s in np.arange(begin_s, end_s - window_s / 2.0, window_s):
            rows.append({"t_s": float(start_s - begin_s), **self._facts(float(start_s), float(start_s) + window_s)})
        return rows

    def chunks(self, rows: Iterable[Mapping[str, Any]], t0_s: float) -> list[dict[str, Any]]:
        """Rows of `chunks.jsonl` of one session (times from `t0_s`), each with what the capture says of it.

        A chunk has the link from its request, or from the last byte of the chunk before, until its own last byte: so
        is goodput meant elsewhere too. Its first packet is there before the receiver's program knows.
        """
        rows = list(rows)
        ends = sorted(row["last_byte_s"] for row in rows if row.get("last_byte_s") is not None)
        joined = []
        for row in rows:
            facts: dict[str, float] = {}
            if (end_s := row.get("last_byte_s")) is not None:
                before = bisect_left(ends, end_s)
                begin_s = max(row["request_s"], ends[before - 1] if before else 0.0)
                facts = self._facts(t0_s + begin_s, t0_s + max(end_s, begin_s + 1e-3))
            joined.append({**row, **{f"capture_{name}": value for name, value in facts.items()}})
        return joined

    def summary(self, record: LinkRecord, *, alone: bool) -> dict[str, Any]:
        """A session in a few numbers. `alone`: nobody else's packets went through the queue, so its counters must
        have counted these."""
        begin_s, end_s = (record.t0_s + record.samples[i].t_s for i in (0, -1))
        captured, counted = self.frames_between(begin_s, end_s), record.delivered_bytes
        error = captured / counted - 1.0 if alone and counted else None
        facts = self._facts(record.t0_s, record.t0_s + record.length_s)
        inside = self.rtt_s[(self.rtt_at_s >= record.t0_s) & (self.rtt_at_s < record.t0_s + record.length_s)]
        return facts | {
            "rtt_min_s": float(inside.min()) if len(inside) else None,
            "captured_bytes": captured,
            "counted_bytes": counted,
            "recorder": recorder(),
            "error": error,
            "dropped": self.dropped,
            "ok": self.dropped == 0 and (error is None or abs(error) <= AGREEMENT),
        }

    def _facts(self, begin_s: float, end_s: float) -> dict[str, float]:
        arrived = (self.arrival_s >= begin_s) & (self.arrival_s < end_s)
        acked = (self.rtt_at_s >= begin_s) & (self.rtt_at_s < end_s)
        again = (self.again_at_s >= begin_s) & (self.again_at_s < end_s)
        return {
            "goodput_bps": self.goodput_bps(begin_s, end_s),
            "rtt_s": _median(self.rtt_s[acked]),
            "one_way_s": _median(self.one_way_s[arrived]),
            "one_way_max_s": _largest(self.one_way_s[arrived]),
            "retransmitted_bytes": int(self.again_bytes[again].sum()),
        }


def analyse(captures: Mapping[str, Capture], sender_ips: Sequence[str], mtu: int = 1500) -> Analysis:
    """Follow every flow of data that leaves one of `sender_ips`, from its sender's capture to the receiver's."""
    senders = frozenset(sender_ips)
    sent = _Sent()
    for end, capture in captures.items():
        if end != RECEIVER:
            for packet in capture.packets(mtu):
                sent.take(packet, senders)
    flows: dict[Flow, _Received] = defaultdict(_Received)
    arrivals = []
    for packet in captures[RECEIVER].packets(mtu):
        if packet.flow[0] not in senders:
            continue
        new, one_way_s = 0, np.nan
        if packet.payload_bytes:
            begin, new = flows[packet.flow].take(packet)
            left_s = sent.last_sent_s(packet, begin)
            one_way_s = np.nan if left_s is None else packet.t_s - left_s
        arrivals.append((packet.t_s, packet.frame_bytes, new, one_way_s))
    table = np.array(arrivals, dtype=np.float64).reshape(-1, 4)
    trips = np.array(sent.trips, dtype=np.float64).reshape(-1, 2)
    again = np.array(sent.again, dtype=np.float64).reshape(-1, 2)
    missed = [capture.dropped for capture in captures.values()]
    return Analysis(
        arrival_s=table[:, 0],
        frame_bytes=table[:, 1].astype(np.int64),
        new_bytes=table[:, 2].astype(np.int64),
        one_way_s=table[:, 3],
        rtt_s=trips[:, 1],
        rtt_at_s=trips[:, 0],
        again_bytes=again[:, 1].astype(np.int64),
        again_at_s=again[:, 0],
        sent_bytes=sent.bytes,
        dropped=None if None in missed else sum(count or 0 for count in missed),
    )


class _Received:
    """One flow at the receiver: what of the stream is there."""

    def __init__(self) -> None:
        self._top: int | None = None
        self._holes: list[tuple[int, int]] = []

    def take(self, packet: Packet) -> tuple[int, int]:
        """(position of its first byte in the stream, payload that is new)."""
        top = packet.sequence if self._top is None else self._top
        begin = _unwrap(packet.sequence, top)
        end = begin + packet.payload_bytes
        new = max(end - max(begin, top), 0)
        holes = []
        for low, high in self._holes:
            new += max(min(high, end) - max(low, begin), 0)
            rest = [(low, min(high, begin)), (max(low, end), high)] if begin < high and low < end else [(low, high)]
            holes += [(first, last) for first, last in rest if first < last]
        self._holes = [*holes, (top, begin)] if begin > top else holes
        self._top = max(top, end)
        return begin, new


class _Sent:
    """The senders' side: when each byte left, what left twice, and the round trips."""

    def __init__(self) -> None:
        self.bytes = 0
        self.trips: list[tuple[float, float]] = []
        self.again: list[tuple[float, int]] = []
        self._top: dict[Flow, int] = {}
        self._times: dict[Flow, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._waiting: dict[Flow, dict[int, float]] = defaultdict(dict)

    def take(self, packet: Packet, senders: Set[str]) -> None:
        if packet.flow[0] not in senders:
            self._acknowledge(packet)
            return
        if not packet.payload_bytes:
            return
        top = self._top.get(packet.flow, packet.sequence)
        begin = _unwrap(packet.sequence, top)
        end = begin + packet.payload_bytes
        self.bytes += packet.payload_bytes
        again = max(min(end, top) - begin, 0)
        self._top[packet.flow] = max(top, end)
        self._times[packet.flow][begin].append(packet.t_s)
        waiting = self._waiting[packet.flow]
        if again:
            self.again.append((packet.t_s, again))
            # Karn's rule: an acknowledgement of data that was sent twice says nothing about the round trip.
            for pending in [edge for edge in waiting if edge > begin]:
                del waiting[pending]
        else:
            waiting[end] = packet.t_s

    def _acknowledge(self, packet: Packet) -> None:
        # A reset acknowledges nothing: without the flag its field is 0, which may look like any place of the stream.
        if not packet.flags & ACK or packet.flags & RST:
            return
        source, source_port, target, target_port = packet.flow
        flow = (target, target_port, source, source_port)
        waiting = self._waiting.get(flow)
        if not waiting:
            return
        edge = _unwrap(packet.acknowledgement, self._top[flow])
        done = []
        for end in waiting:  # in order of sending, so of the stream
            if end > edge:
                break
            done.append(end)
        if done:
            self.trips.append((packet.t_s, packet.t_s - waiting[done[-1]]))
        for end in done:
            del waiting[end]

    def last_sent_s(self, packet: Packet, begin: int) -> float | None:
        """When the packet with this data last left before it arrived."""
        times = self._times.get(packet.flow, {}).get(begin)
        earlier = [time_s for time_s in times or () if time_s <= packet.t_s]
        return earlier[-1] if earlier else None


def _unwrap(sequence: int, near: int) -> int:
    """The stream position nearest to `near` whose low 32 bits are `sequence`."""
    return near + ((sequence - near + SEQUENCES // 2) % SEQUENCES) - SEQUENCES // 2


def _median(values: NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(np.median(found)) if len(found) else float("nan")


def _largest(values: NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(found.max()) if len(found) else float("nan")
