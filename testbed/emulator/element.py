"""The element: a process on a middle host that holds, drops, reorders and duplicates the packets it forwards.

`python -m kvstream.testbed.emulator.element SETTINGS` with the settings of `Impairments` as JSON. Queue 0 holds what
goes toward the receivers, queue 1 what comes back; `kvstream.testbed.emulator.impairments` puts the iptables rules
that fill them. Prints `ready`, then reads lines of JSON until its input ends:

    {"report": true}                                   answered with a line of JSON: the counters
    {"steps": [[CLOCK_MONOTONIC, delay_s, loss], ..]}  delay and loss from then on, replacing earlier steps

A packet is due `delay` after it came. While packets come in quick succession they are looked at every PERIOD_S, which
is what the processor time goes by; one that was found then came half of that ago on average, and one that is due within
half of it goes now, so that the looks add nothing to the delay on average. Times are kept by a scheduling slice of 0.1
ms, so that a busy machine does not make the delay longer; what it still adds is counted.
"""

from __future__ import annotations

import gc
import heapq
import json
import random
import select
import socket
import sys
import time
from collections import deque
from typing import Any, Final

from kvstream.testbed.emulator.nfqueue import ACCEPT, DROP, PacketQueue, payload_of
from kvstream.testbed.host.clock import Urgency, be_punctual, spent_s
from kvstream.testbed.host.json_lines import Requests

EARLY_S: Final = 0.00003
"""Packets that are due this soon go along: waking up again would take longer."""
BATCH: Final = 256
PERIOD_S: Final = 0.0004
"""While packets come in quick succession they are looked at this often; one that comes alone is seen at once."""
LATE_BINS_S: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)


class Lane:
    """One direction through the element."""

    def __init__(self, queue: PacketQueue, settings: dict[str, Any], *, forward: bool) -> None:
        self.queue = queue
        self.delay_s: float = settings["delay_s"]
        self.jitter_s: float = settings["jitter_s"]
        self.ordered: bool = settings["ordered"]
        # What harms packets does so on the way to the receivers only, like the bottleneck.
        self.losses = Losses(settings) if forward and settings["lossy"] else None
        self.reorder: float = settings["reorder"] if forward else 0.0
        self.duplicate: float = settings["duplicate"] if forward else 0.0
        self.random = random.Random(f"{settings['seed']}/{'forward' if forward else 'back'}")
        self.plain = not (self.jitter_s or self.losses or self.reorder or self.duplicate)
        self.held: deque[tuple[float, int]] = deque()
        self.heap: list[tuple[float, int, bytes]] = []
        self.last_due_s = 0.0
        self.counts = dict.fromkeys(("packets", "dropped", "reordered", "duplicated"), 0)
        self.late = [0] * (len(LATE_BINS_S) + 1)
        self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) if self.duplicate else None

    def next_due_s(self) -> float | None:
        if self.plain:
            return self.held[0][0] if self.held else None
        return self.heap[0][0] if self.heap else None

    def take(self, unseen_s: float) -> None:
        """Read what waits and decide when each packet goes, or that it does not. It came up to `unseen_s` ago."""
        packets = self.queue.receive(BATCH)
        came_s = time.monotonic() - unseen_s / 2.0
        self.counts["packets"] += len(packets)
        if self.plain:
            # After a delay became shorter, what comes now must not go before what is held.
            due = self.last_due_s = max(came_s + self.delay_s, self.last_due_s)
            self.held.extend((due, packet_id) for packet_id, _ in packets)
            return
        dropped = []
        for packet_id, message in packets:
            if self.losses is not None and self.losses.draw():
                dropped.append((packet_id, DROP))
                continue
            due = came_s + max(self.delay_s + self.jitter_s * self.random.uniform(-1.0, 1.0), 0.0)
            if self.ordered:
                due = self.last_due_s = max(due, self.last_due_s)
            if self.reorder and self.random.random() < self.reorder:
                due = came_s
                self.counts["reordered"] += 1
            copy = b""
            if self.duplicate and self.random.random() < self.duplicate:
                copy = payload_of(message)
            heapq.heappush(self.heap, (due, packet_id, copy))
        if dropped:
            self.counts["dropped"] += len(dropped)
            self.queue.decide(dropped)

    def release(self, early_s: float) -> None:
        """Let go what is due within `early_s`."""
        now = time.monotonic()
        limit = now + early_s
        if self.plain:
            waiting = len(self.held)
            first_due = self.held[0][0] if self.held else now
            last = None
            while self.held and self.held[0][0] <= limit:
                last = self.held.popleft()
            if last is not None:
                self.queue.accept_up_to(last[1])
                self._note_late(now - first_due, waiting - len(self.held))  # none of them is later than the first
            return
        verdicts = []
        copies = []
        while self.heap and self.heap[0][0] <= limit:
            due, packet_id, copy = heapq.heappop(self.heap)
            verdicts.append((packet_id, ACCEPT))
            self._note_late(now - due)
            if copy:
                copies.append(copy)
        if verdicts:
            self.queue.decide(verdicts)
        for copy in copies:
            assert self.raw is not None
            self.raw.sendto(copy, (socket.inet_ntoa(copy[16:20]), 0))
            self.counts["duplicated"] += 1

    def _note_late(self, late_s: float, packets: int = 1) -> None:
        for i, bound in enumerate(LATE_BINS_S):
            if late_s <= bound:
                self.late[i] += packets
                return
        self.late[-1] += packets

    def report(self) -> dict[str, Any]:
        return {**self.counts, "late": self.late, "lost_by_kernel": self.queue.lost()}


class Losses:
    """Says, packet by packet, whether it is lost: independently, or by the Gilbert-Elliott chain.

    In the chain's bad state a packet is lost with probability `loss_bad`, and the state lasts `loss_burst` packets on
    average; it is entered just often enough for the mean to be `loss`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._uniform = random.Random(f"{settings['seed']}/loss").random
        self._burst: float = settings["loss_burst"]
        self._bad_loss: float = settings["loss_bad"]
        self._bad = False
        self.set(settings["loss"])

    def set(self, loss: float) -> None:
        """Lose this mean fraction from now on."""
        self._loss = loss
        share = min(loss / self._bad_loss, 0.999)
        self._leave = 1.0 / self._burst if self._burst else 1.0
        self._enter = self._leave * share / (1.0 - share)

    def draw(self) -> bool:
        if not self._burst:
            return self._uniform() < self._loss
        self._bad = self._uniform() >= self._leave if self._bad else self._uniform() < self._enter
        return self._bad and self._uniform() < self._bad_loss


def main(settings: dict[str, Any]) -> None:
    punctual = be_punctual(Urgency.LINK)
    queues = [PacketQueue(number, payload=bool(settings["duplicate"])) for number in (0, 1)]
    lanes = [Lane(queue, settings, forward=i == 0) for i, queue in enumerate(queues)]
    by_descriptor = {lane.queue.socket.fileno(): lane for lane in lanes}
    requests = Requests()
    watched = [*by_descriptor, requests.fileno()]
    gc.disable()  # nothing here makes cycles, and a collection would hold packets up
    print("ready", flush=True)
    last_s = 0.0
    steps: deque[list[float]] = deque()
    while True:
        pause_s = max(last_s + PERIOD_S - time.monotonic(), 0.0)
        if pause_s:
            time.sleep(pause_s)
        due = [time_s for lane in lanes if (time_s := lane.next_due_s()) is not None]
        due += [steps[0][0]] if steps else []
        wait = max(min(due) - time.monotonic(), 0.0) if due else None
        early_s = EARLY_S
        for readable in select.select(watched, [], [], wait)[0]:
            if readable == requests.fileno():
                asked = requests.read()
                if asked is None:
                    return
                for request in asked:
                    if "steps" in request:
                        steps = deque(request["steps"])
                    else:
                        reports = [lane.report() for lane in lanes]
                        print(json.dumps({"lanes": reports, "cpu_s": spent_s(), "scheduling": punctual}), flush=True)
            else:
                by_descriptor[readable].take(pause_s)
                last_s, early_s = time.monotonic(), PERIOD_S / 2.0
        while steps and steps[0][0] <= time.monotonic():
            _, delay_s, loss = steps.popleft()
            for lane in lanes:
                lane.delay_s = delay_s
                if lane.losses is not None:
                    lane.losses.set(loss)
        for lane in lanes:
            lane.release(early_s)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
