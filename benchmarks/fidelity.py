"""Whether the emulated link follows its trace: replay, delay, loss, probe, set-up, sharing, each with its threshold.

    python benchmarks/fidelity.py [--only PART ...] [--out FILE.json] [--small]

Everything runs in a sandbox, as root or not. Parts: replay, lateness, steps, corners (steps up, outages, bursts), delay
(with the cost in CPU), loss, element (how much ours takes), probe, setup, sharing, quiet and crowded (sessions of a
second at 0.1 to 1.4 Gbit/s with the machine for themselves, and beside programs that take every core: the first must be
valid and the second must not); all take about 17 minutes. With
--out the file is extended: parts that are measured again replace their old rows, others stay, so that the table can be
made in pieces. `steps` also drives Mininet's own `TCLink.config` through the same rates, and both are measured at the
receiver.

A measurement under CPU contention (other programs held the cores) says little about the link: it is repeated, up to
three times in all, and the median of the undisturbed ones counts. Where all were disturbed, the row says so.
`--small` is a preview only. What a killed run leaves behind is `benchmarks/kills.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from kvstream.testbed.emulator import sandbox, traffic  # noqa: E402
from kvstream.testbed.emulator.fidelity import Fidelity, expected_bytes, stretches, windows  # noqa: E402
from kvstream.testbed.emulator.impairments import Impairments  # noqa: E402
from kvstream.testbed.emulator.link import LinkSettings  # noqa: E402
from kvstream.testbed.emulator.measure import replay  # noqa: E402
from kvstream.testbed.emulator.path import LinkPath, open_path  # noqa: E402
from kvstream.testbed.emulator.probe import Prober  # noqa: E402
from kvstream.testbed.emulator.record import LinkRecord  # noqa: E402
from kvstream.testbed.emulator.topology import Network  # noqa: E402
from kvstream.testbed.host.clock import CpuMeter  # noqa: E402
from kvstream.traces.framing import goodput_per_capacity  # noqa: E402
from kvstream.traces.resolve import open_trace  # noqa: E402
from kvstream.traces.trace import Trace  # noqa: E402

TOTAL_BAR = 0.005
"""On the error of all bytes, while backlogged and of the whole replay."""
SLOW_BAR = 0.02
"""The same at rates of which half a minute is a few hundred packets."""
UNJUDGED_BAR = 0.1
"""On the part of a saturated link's time that could not be judged."""


@dataclass(frozen=True)
class Case:
    """A trace to replay, thresholds for the error of its windows (median, 95th percentile) and of all its bytes."""

    spec: str
    median: float
    p95: float | None = None
    total: float = TOTAL_BAR
    length_s: float = 20.0
    queue_s: float = 0.05


SLOW_QUEUE_S = 0.5
"""At 0.1 Mbit/s 50 ms are less than a packet, and a queue of two leaves TCP nothing to back off with."""
REPLAYS = {
    "uniform 0.1-10 Gbit/s, held 0.2 s": Case("uniform,low=100Mbps,high=10Gbps,hold=0.2s,seed=7", 0.01, 0.04),
    "uniform 2-50 Mbit/s, held 0.2 s": Case("uniform,low=2Mbps,high=50Mbps,hold=0.2s,seed=7", 0.015),
    "LTE-like walk": Case("lte-walk", 0.015),
    **{
        f"{mbps:g} Mbit/s": Case(f"constant,rate={mbps}Mbps", 0.03, None, SLOW_BAR, 30.0, SLOW_QUEUE_S)
        for mbps in (0.1, 0.3, 1.0)
    },
    "HSDPA-like walk, 0.1-6 Mbit/s a second": Case(
        "lognormal,median=1.2Mbps,sigma=0.6,memory=5s,low=100kbps,high=6Mbps,hold=1s,seed=3,length=60s",
        0.03,
        None,
        SLOW_BAR,
        30.0,
        SLOW_QUEUE_S,
    ),
    "EVDO-like walk, 0.05-2 Mbit/s": Case(
        "lognormal,median=600kbps,sigma=0.7,memory=1s,low=50kbps,high=2Mbps,hold=0.2s,seed=5,length=60s",
        0.05,
        None,
        SLOW_BAR,
        30.0,
        SLOW_QUEUE_S,
    ),
}
"""The last two have the rates and the rhythm of public logs (Norway's commutes, mahimahi's Verizon EVDO)."""
STEPS_S = (0.01, 0.05, 0.1, 1.0)
STEP_RATES_MBPS = (20.0, 200.0)
STEP_LINK = LinkSettings(queue_bytes=2_500_000, offloads=False)
"""A queue that stays, as in Mininet, and single packets, so that the receiver's counter counts what the shaper does."""
DELAYS_MS = (1, 5, 20, 80, 200)
FLOW_BYTES = 25e6
"""What one TCP flow can have under way: its window ends with a buffer of 64 MiB, at 1.2 Gbit/s over 80 ms."""
RAMP_S = 20.0
LOSSES = (0.001, 0.01, 0.1)
ELEMENT_RATES = (10e3, 20e3, 30e3, 40e3, 50e3, 60e3, 80e3, 100e3, 120e3, 150e3, 200e3)
"""Packets per second."""
PROBED_MBPS = (10.0, 100.0, 1000.0)
SESSIONS, SESSION_GBPS = 20, (0.1, 1.4)
TRIES = 3
CALM = 0.05
"""CPU contention, in seconds per second, up to which a measurement counts as undisturbed."""
WATCH_S = 0.25


@dataclass(frozen=True)
class Value:
    """One number, and the most it may be."""

    what: str
    value: float
    unit: str
    threshold: float | None = None


@contextlib.contextmanager
def watching() -> Iterator[list[float]]:
    """Sum up how long processes of this sandbox wait for a CPU that other programs use, while the context lasts."""
    starved_s, over = [0.0], threading.Event()

    def watch() -> None:
        meter = CpuMeter()
        while not over.wait(WATCH_S):
            _, own, foreign, waited, _ = meter.read()
            starved_s[0] += waited * foreign / max(own + foreign, 1e-9)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield starved_s
    finally:
        over.set()
        watcher.join()


class Table:
    """Rows of (part, what, value, threshold, whether it was met), printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def steady(self, part: str, measure: Callable[[], list[Value]]) -> None:
        """Measure until it was calm, at most TRIES times, and keep the median of what was measured in calm."""
        tries: list[tuple[float, list[Value]]] = []
        while len(tries) < TRIES and not (tries and tries[-1][0] <= CALM):
            with watching() as starved_s:
                begin_s = time.monotonic()
                found = measure()
            tries.append((starved_s[0] / (time.monotonic() - begin_s), found))
        kept = [found for starved, found in tries if starved <= CALM] or [found for _, found in tries]
        starved = min(starved for starved, _ in tries)
        for same in zip(*kept, strict=True):
            self._add(part, same[0], median(one.value for one in same), starved, len(tries))

    def once(self, part: str, found: Value) -> None:
        """Keep what was found, whatever else the machine did."""
        self._add(part, found, found.value, 0.0, 1)

    def _add(self, part: str, what: Value, value: float, starved: float, tries: int) -> None:
        met = None if what.threshold is None else bool(value <= what.threshold)
        self.rows.append({"part": part, **asdict(what), "value": value, "met": met, "starved": starved, "tries": tries})
        scale, shown = (100.0, "%") if what.unit == "fraction" else (1.0, what.unit)
        threshold = (
            "" if what.threshold is None else f"<= {what.threshold * scale:g} {shown}   {'ok' if met else 'MISSED'}"
        )
        note = "" if starved <= CALM else f"   (CPU contention {starved:.2f} s/s, {tries} tries)"
        print(f"{part:9} {what.what:62} {value * scale:10.3f} {shown:6} {threshold}{note}", flush=True)


@contextlib.contextmanager
def busy(network: Network, count: int) -> Iterator[None]:
    """Processes of the run that never rest, on sender and receiver."""
    spinners = [
        network.popen(host, [sys.executable, "-c", "while True: pass"], stdout=subprocess.PIPE, text=True)
        for host in (network.sender, network.receiver)
        for _ in range(count // 2)
    ]
    try:
        yield
    finally:
        for spinner in spinners:
            traffic.end(spinner)


# ---- replay -----------------------------------------------------------------------------------------------------


def replays(table: Table, small: bool) -> None:
    for name, case in REPLAYS.items():
        trace = open_trace(case.spec)

        def measure(trace: Trace = trace, case: Case = case, name: str = name) -> list[Value]:
            length_s = case.length_s / 4.0 if small else case.length_s
            done = replay(trace, LinkSettings(queue_s=case.queue_s), length_s)
            assert done.goodput_per_trace is not None
            off = abs(done.goodput_per_trace - 1.0)
            slow = case.total > TOTAL_BAR  # there one flow's backing off shows, and is not the link's
            return [
                *against_trace(name, done.record, trace, case.median, case.p95, case.total),
                Value(f"{name}: time not judged", 1.0 - done.verdict.coverage, "fraction", UNJUDGED_BAR),
                Value(f"{name}: goodput of one TCP flow against the trace", done.goodput_per_trace, "fraction"),
                Value(f"{name}: all bytes of {length_s:g} s", off, "fraction", None if slow else TOTAL_BAR),
            ]

        table.steady("replay", measure)


def against_trace(
    name: str,
    record: LinkRecord,
    trace: Trace,
    median_threshold: float | None,
    p95_threshold: float | None,
    total_threshold: float = TOTAL_BAR,
) -> list[Value]:
    """What the class delivered while it was backlogged, against what the trace carries."""
    expected = expected_bytes(record, trace)
    found, judged = windows(record, expected, 0.1), stretches(record, expected)
    errors = np.abs([window.error for window in found])
    delivered = sum(stretch.delivered_bytes for stretch in judged)
    carried = sum(stretch.expected_bytes for stretch in judged)
    widest_s = max(window.end_s - window.start_s for window in found)
    return [
        Value(f"{name}: median error of windows", float(np.median(errors)), "fraction", median_threshold),
        Value(f"{name}: 95th percentile of it", float(np.percentile(errors, 95)), "fraction", p95_threshold),
        Value(
            f"{name}: error of all bytes while backlogged", abs(delivered / carried - 1.0), "fraction", total_threshold
        ),
        Value(f"{name}: windows", len(found), ""),
        Value(f"{name}: widest window", widest_s, "s"),
    ]


def lateness(table: Table, small: bool) -> None:
    """Changes every 50 ms while sender and receiver keep every core busy."""
    count = 60 if small else 400
    trace = Trace("late", np.full(count, 0.05), np.random.default_rng(5).uniform(20e6, 200e6, count))

    def measure() -> list[Value]:
        with open_path(LinkSettings(), [trace]) as path:
            network = path.network
            server = traffic.start_server(network, network.sender, network.sender_ip)
            client = traffic.start_pull(network, network.receiver, network.sender_ip, seconds=count * 0.05 + 1.0)
            with busy(network, 2 * max(os.cpu_count() or 1, 2)):
                time.sleep(0.5)
                t0_s = time.monotonic() + 0.05
                path.arm(trace, t0_s, count * 0.05)
                record = path.finish(t0_s + count * 0.05).down
            for process in (client, server):
                traffic.end(process)
        late = np.array(record.lateness_s) * 1e3
        name = f"all cores busy, {record.settings['scheduling']}"
        return [
            Value(f"rate changes, {name}: median", float(np.median(late)), "ms"),
            Value(f"rate changes, {name}: p99", float(np.percentile(late, 99)), "ms", 0.5),
            *against_trace("all cores busy", record, trace, None, None)[:1],
        ]

    table.steady("lateness", measure)


def steps(table: Table, small: bool) -> None:
    """The same random rates through our shaper and through Mininet's TCLink.config, both measured at the receiver."""
    for step_s in STEPS_S:
        count = max(int((2.0 if small else 6.0) / step_s), 4)
        rates = np.random.default_rng(3).uniform(*STEP_RATES_MBPS, count) * 1e6
        trace = Trace("steps", np.full(count, step_s), rates)
        for name, drive in (("ours", drive_ours), ("TCLink.config", drive_mininet)):
            what = f"{step_s * 1e3:g} ms, {name}: "

            def measure(trace: Trace = trace, drive: Any = drive, what: str = what) -> list[Value]:
                return at_receiver(trace, drive, what)

            table.steady("steps", measure)


def at_receiver(trace: Trace, drive: Callable[[Trace], Any], what: str) -> list[Value]:
    begin_s, arrived, late = drive(trace)
    times, sums = zip(*arrived, strict=True)
    edges = begin_s + np.concatenate(([0.0], np.cumsum(trace.durations_s)))
    received = np.diff(np.interp(edges, times, sums))
    wanted = trace.rates_bps / 8.0 * trace.durations_s
    error = np.abs(received / wanted - 1.0)
    return [
        Value(what + "median error of a step", float(np.median(error)), "fraction"),
        Value(what + "p90", float(np.percentile(error, 90)), "fraction"),
        Value(what + "of all bytes", abs(float(received.sum() / wanted.sum()) - 1.0), "fraction"),
        Value(what + "lateness p99", float(np.percentile(late, 99)) * 1e3, "ms"),
    ]


def drive_ours(trace: Trace) -> tuple[float, list[list[float]], list[float]]:
    found: dict[str, Any] = {}

    def change(path: LinkPath) -> None:
        t0_s = time.monotonic() + 0.05
        path.arm(trace, t0_s, trace.duration_s)
        record = path.finish(t0_s + trace.duration_s).down
        found.update(begin_s=t0_s, late=record.lateness_s)

    with open_path(STEP_LINK, [trace]) as path:
        arrived = filled(path.network, trace.duration_s, lambda: change(path))
    return found["begin_s"], arrived, found["late"]


def drive_mininet(trace: Trace) -> tuple[float, list[list[float]], list[float]]:
    """Mininet as it comes: a TCIntf whose rate is changed by its own `config`."""
    from mininet.link import TCIntf
    from mininet.log import setLogLevel

    setLogLevel("critical")  # it prints a warning of the kernel as an error at every step
    found: dict[str, Any] = {"late": []}
    with Network(STEP_LINK, traces=[trace]) as network:
        interface = network.router.nameToIntf[network.bottleneck]
        interface.__class__ = TCIntf
        interface.config(bw=float(trace.rates_bps[0]) / 1e6)

        def change() -> None:
            t0_s = time.monotonic() + 0.05
            for at_s, rate_bps in trace.changes(0.0, trace.duration_s):
                time.sleep(max(t0_s + at_s - time.monotonic(), 0.0))
                interface.config(bw=rate_bps / 1e6)
                found["late"].append(time.monotonic() - t0_s - at_s)
            time.sleep(max(t0_s + trace.duration_s - time.monotonic(), 0.0))
            found["begin_s"] = t0_s

        arrived = filled(network, trace.duration_s, change)
    return found["begin_s"], arrived, found["late"]


STEPS_UP_MBPS = ((0.1, 10.0), (1.0, 100.0), (10.0, 200.0))
OUTAGE_S = 0.5


def corners(table: Table, small: bool) -> None:
    """What a rate-limited class cannot do exactly: steps up from a low rate, outages, the moment after silence."""
    for low, high in STEPS_UP_MBPS:
        name = f"step up from {low:g} to {high:g} Mbit/s"
        table.steady("corners", lambda low=low, high=high, name=name: step_up(low * 1e6, high * 1e6, name))
    table.steady("corners", outage)
    table.steady("corners", burst)


def step_up(low_bps: float, high_bps: float, name: str) -> list[Value]:
    """By how much the new rate begins late: what is missing of it in the first 0.3 s, as time."""
    trace = Trace("up", [1.0, 0.3] * 3, [low_bps, high_bps] * 3)
    record = saturated(trace)
    times, sums = zip(*((sample.t_s, sample.delivered_bytes) for sample in record.samples), strict=True)
    late_s = []
    for k in range(3):
        begin_s = 1.3 * k + 1.0
        got = np.diff(np.interp([begin_s, begin_s + 0.29], times, sums))[0]
        late_s.append(0.29 - got * 8.0 / high_bps)
    at_most = 1514 * 8 / low_bps + 0.002  # a packet at the old rate, and the burst
    return [
        Value(f"{name}: late by, median of 3", float(np.median(late_s)) * 1e3, "ms", at_most * 1e3),
        Value(f"{name}: late by, at most", max(late_s) * 1e3, "ms"),
    ]


def outage() -> list[Value]:
    """What passes a link whose rate is 0, and how soon it runs again."""
    trace = Trace("outage", [0.5, OUTAGE_S, 0.5], [20e6, 0.0, 20e6])
    record = saturated(trace)
    times, sums = zip(*((sample.t_s, sample.delivered_bytes) for sample in record.samples), strict=True)
    leaked = np.diff(np.interp([0.51, 0.5 + OUTAGE_S - 0.005], times, sums))[0]
    after = np.diff(np.interp([0.5 + OUTAGE_S, 0.5 + OUTAGE_S + 0.3], times, sums))[0]
    return [
        Value(f"outage of {OUTAGE_S:g} s at 20 Mbit/s: leaked", float(leaked) / record.packet_bytes, "packets", 2.0),
        Value("after it: late by", (0.3 - after * 8.0 / 20e6) * 1e3, "ms", 5.0),
    ]


def burst() -> list[Value]:
    """What comes at once after silence: bytes of the first 30 ms above the rate, as time of the rate."""
    rate_bps, span_s = 50e6, 0.03
    trace = Trace("silent", [60.0], [rate_bps])
    ahead_s = []
    with open_path(STEP_LINK, [trace]) as path:
        network = path.network
        server = traffic.start_server(network, network.sender, network.sender_ip)
        for _ in range(5):
            client = traffic.start_pull(
                network, network.receiver, network.sender_ip, wanted_bytes=1_000_000, seconds=5.0
            )
            arrivals = traffic.result_of(client)["arrivals"]
            times, sums = zip(*arrivals, strict=True)
            got = float(np.interp(times[0] + span_s, times, sums)) - sums[0] + 1448
            ahead_s.append(got * 8.0 / (rate_bps * goodput_per_capacity(1500)) - span_s)
        traffic.end(server)
    return [Value("after silence at 50 Mbit/s: ahead by, median of 5", float(np.median(ahead_s)) * 1e3, "ms", 4.0)]


def saturated(trace: Trace) -> LinkRecord:
    """A replay of a trace under TCP that always has data waiting."""
    found: list[LinkRecord] = []

    def change(path: LinkPath) -> None:
        t0_s = time.monotonic() + 0.05
        path.arm(trace, t0_s, trace.duration_s)
        found.append(path.finish(t0_s + trace.duration_s).down)

    with open_path(STEP_LINK, [trace]) as path:
        filled(path.network, trace.duration_s, lambda: change(path))
    return found[0]


WATCH = """
import sys, time
from kvstream.testbed.host.clock import Urgency, be_punctual
be_punctual(Urgency.LINK)
print("ready", flush=True)
due, end = time.monotonic(), time.monotonic() + float(sys.argv[1])
seen = []
while due < end:
    with open("/sys/class/net/receiver0-left/statistics/rx_bytes") as file:
        seen.append((time.monotonic(), int(file.read())))
    due += 0.002
    time.sleep(max(due - time.monotonic(), 0.0))
for at_s, received in seen:  # a pipe that nobody reads meanwhile would fill, and stop the watching
    print(at_s, received)
"""


def filled(network: Network, length_s: float, meanwhile: Callable[[], None]) -> list[list[float]]:
    """Do something while four TCP flows take all they can get (one alone may pause after drops).

    Gives [time, bytes that have reached the receiver's interface] every 2 ms.
    """
    server = traffic.start_server(network, network.sender, network.sender_ip)
    clients = [
        traffic.start_pull(network, network.receiver, network.sender_ip, seconds=length_s + 3.0) for _ in range(4)
    ]
    time.sleep(1.0)
    watch = [sys.executable, "-c", WATCH, str(length_s + 1.0)]
    watcher = network.popen(network.receiver, watch, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    watcher.stdout.readline()
    meanwhile()
    lines = watcher.communicate()[0].splitlines()
    for process in (*clients, server):
        traffic.end(process)
    return [[float(word) for word in line.split()] for line in lines]


# ---- delay and loss ---------------------------------------------------------------------------------------------

STAMPS = """
import json, socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if sys.argv[1] == "take":
    s.bind(("", 9)); s.settimeout(5.0)
    s.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS: the kernel notes when a datagram came, not this process
    print("ready", flush=True)
    got = []
    try:
        for _ in range(int(sys.argv[2])):
            data, (stamp, *_), *_ = s.recvmsg(100, 100)
            seconds, nanoseconds = struct.unpack("qq", stamp[2])
            got.append(seconds + nanoseconds * 1e-9 - struct.unpack("d", data)[0])
    except TimeoutError:
        pass
    print(json.dumps(got))
else:
    for _ in range(int(sys.argv[2])):
        s.sendto(struct.pack("d", time.time()), (sys.argv[3], 9))
        time.sleep(0.003)
"""


FLOOD = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
due = time.monotonic()
for i in range(int(sys.argv[2])):
    s.sendto(bytes(1400), (sys.argv[1], 9))
    if i % 64 == 63:
        due += 64 / float(sys.argv[3])
        time.sleep(max(due - time.monotonic(), 0.0))
"""


def one_way(network: Network, source: Any, target: Any, address: str, count: int) -> np.ndarray[Any, Any]:
    """One-way delays of small datagrams, in seconds; both ends have one clock."""
    taker = network.popen(target, [sys.executable, "-c", STAMPS, "take", str(count)], stdout=subprocess.PIPE, text=True)
    assert taker.stdout is not None
    taker.stdout.readline()
    network.run(source, [sys.executable, "-c", STAMPS, "give", str(count), address])
    return np.array(json.loads(taker.communicate()[0]))


def delays(table: Table, small: bool) -> None:
    """Against the same path without delay. Loaded: 2 Gbit/s flow the other way, and every core is busy."""
    count = 100 if small else 500
    plain: dict[str, float] = {}
    for delay_ms in (0, *DELAYS_MS):
        table.steady("delay", lambda delay_ms=delay_ms: delayed(delay_ms, count, plain))  # type: ignore[misc]


def delayed(delay_ms: int, count: int, plain: dict[str, float]) -> list[Value]:
    """One delay; without any it fills `plain`, the path's own."""
    trace = Trace("2G", np.array([1.0]), np.array([2e9]), end="hold")
    # A queue of a round trip keeps the link full while flows recover from a drop; the reverse path does not pass it.
    link = LinkSettings(delay_s=delay_ms * 1e-3, queue_s=max(0.05, 2e-3 * delay_ms))
    flows = math.ceil(max(2e9 / 8.0 * 2.0 * link.delay_s / FLOW_BYTES, 1.0))
    with open_path(link, [trace]) as path:
        network = path.network
        back = (network.receiver, network.sender, network.sender_ip)
        there = (network.sender, network.receiver, network.receiver_ips[0])
        found = {"there": one_way(network, *there, count), "back": one_way(network, *back, count)}
        server = traffic.start_server(network, network.sender, network.sender_ip)
        clients = [
            traffic.start_pull(network, network.receiver, network.sender_ip, seconds=120.0) for _ in range(flows)
        ]
        ramp_up(network, float(trace.rates_bps[0]))
        path.arm(trace, time.monotonic(), 60.0)
        before = cpu_of_element(path)
        found["back, 2 Gbit/s there"] = one_way(network, *back, count)
        spent_s = cpu_of_element(path) - before
        record = path.finish().down
        with busy(network, 2 * max(os.cpu_count() or 1, 2)):
            path.arm(trace, time.monotonic(), 60.0)
            found["back, 2 Gbit/s there, cores busy"] = one_way(network, *back, count)
            path.finish()
        for process in (*clients, server):
            traffic.end(process)
        backend = "none" if path.impairments is None else path.impairments.backend
    values = []
    for name, seen in found.items():
        median_ms = float(np.median(seen)) * 1e3
        if delay_ms == 0:
            plain[name] = median_ms
            values.append(Value(f"without delay, {name}", median_ms, "ms"))
            continue
        loaded = "cores busy" in name
        what = f"{delay_ms} ms ({backend}), {name}: "
        off_ms = abs(median_ms - plain[name] - delay_ms)
        values.append(Value(what + "off by (median)", off_ms, "ms", max(0.5, 0.02 * delay_ms)))
        spread_ms = float(np.percentile(seen, 99)) * 1e3 - median_ms
        values.append(Value(what + "jitter p99", spread_ms, "ms", 2.0 if loaded else None))
    if delay_ms:
        share = (spent_s + record.settings["shaper_cpu_s"]) / record.length_s
        rate_gbps = record.delivered_bytes * 8.0 / record.length_s / 1e9
        values.append(Value(f"{delay_ms} ms: rate meanwhile", rate_gbps, "Gbit/s"))
        values.append(Value(f"{delay_ms} ms: CPU of shaper, counters, element", share, "cores", 0.25))
    return values


def ramp_up(network: Network, rate_bps: float) -> None:
    """Wait until the flows take the whole rate, or as much as this machine lets them within RAMP_S."""
    end_s = time.monotonic() + RAMP_S
    before, before_s = received_bytes(network), time.monotonic()
    while time.monotonic() < end_s:
        time.sleep(0.5)
        now, now_s = received_bytes(network), time.monotonic()
        if (now - before) * 8.0 >= 0.98 * rate_bps * goodput_per_capacity(1500) * (now_s - before_s):
            return
        before, before_s = now, now_s


def received_bytes(network: Network) -> int:
    """Bytes that have reached the receiver's interface; groups of segments count with the headers of one."""
    return int(network.run(network.receiver, ["cat", "/sys/class/net/receiver0-left/statistics/rx_bytes"]))


def cpu_of_element(path: LinkPath) -> float:
    return 0.0 if path.impairments is None else float(path.impairments.report().get("cpu_s", 0.0))


def losses(table: Table, small: bool) -> None:
    """Numbered datagrams of one MTU; the threshold is three binomial sigma."""
    for loss in LOSSES:
        table.steady("loss", lambda loss=loss: lost(loss, int((100 if small else 1100) / loss)))  # type: ignore[misc]


def lost(loss: float, count: int) -> list[Value]:
    with Network(LinkSettings(loss=loss, seed=11)) as network:
        impairments = Impairments(network)
        before = received_packets(network)
        start_s = time.monotonic()
        network.run(network.sender, [sys.executable, "-c", FLOOD, network.receiver_ips[0], str(count), "30000"])
        spent_s = time.monotonic() - start_s
        time.sleep(0.5)
        missing = count - (received_packets(network) - before)
        what = f"{loss:.1%} of {count} packets ({impairments.backend}): "
    sigma = (count * loss * (1.0 - loss)) ** 0.5
    return [
        Value(what + "lost", missing, ""),
        Value(what + "off by", abs(missing - count * loss) / sigma, "sigma", 3.0),
        Value(what + "rate", count / spent_s / 1e3, "k/s"),
    ]


def received_packets(network: Network) -> int:
    """UDP datagrams that reached the receiver's stack."""
    lines = network.run(network.receiver, ["cat", "/proc/net/snmp"]).splitlines()
    names, values = (line.split() for line in lines if line.startswith("Udp:"))
    counters = dict(zip(names[1:], map(int, values[1:]), strict=True))
    return counters["InDatagrams"] + counters["NoPorts"] + counters["InErrors"]


# ---- how far the element and the probe go ------------------------------------------------------------------------


def element(table: Table, small: bool) -> None:
    length_s = 1.0 if small else 3.0
    table.steady("element", lambda: [*singles(length_s), *groups(length_s)])


def singles(length_s: float) -> list[Value]:
    """The highest rate of datagrams of one MTU at which the element keeps up and the kernel drops none on its way."""
    kept = 0.0
    for rate in ELEMENT_RATES:
        count = int(rate * length_s)
        with Network(LinkSettings(delay_s=0.005, loss=0.001, impair="nfqueue", seed=11)) as network:
            impairments = Impairments(network)
            start_s = time.monotonic()
            network.run(network.sender, [sys.executable, "-c", FLOOD, network.receiver_ips[0], str(count), str(rate)])
            spent_s = time.monotonic() - start_s
            lane = impairments.report()["lanes"][0]
        if lane["lost_by_kernel"] or lane["packets"] < 0.99 * count:
            break
        kept = max(kept, count / spent_s)
    return [Value("single packets, none lost by the kernel", kept / 1e3, "k/s")]


def groups(length_s: float) -> list[Value]:
    """What TCP gets through a delay of 5 ms where nothing else limits it."""
    with Network(LinkSettings(delay_s=0.005, impair="nfqueue")) as network:
        impairments = Impairments(network)
        server = traffic.start_server(network, network.sender, network.sender_ip)
        clients = [
            traffic.start_pull(network, network.receiver, network.sender_ip, seconds=length_s + 1.5) for _ in range(2)
        ]
        begin_s = time.monotonic() + 1.0
        results = [traffic.result_of(client) for client in clients]
        rate = sum(traffic.rate_between(result, begin_s, begin_s + length_s) for result in results)
        lost = sum(lane["lost_by_kernel"] for lane in impairments.report()["lanes"])
        traffic.end(server)
    return [
        Value("TCP in groups, goodput", rate / 1e9, "Gbit/s"),
        Value("TCP in groups, lost by the kernel", lost, "", 0),
    ]


def probe(table: Table, small: bool) -> None:
    for rate_mbps in PROBED_MBPS:
        table.steady("probe", lambda rate_mbps=rate_mbps: probed(rate_mbps, 3 if small else 10))  # type: ignore[misc]


def probed(rate_mbps: float, count: int) -> list[Value]:
    """How far the probe's estimates are from a link of one rate."""
    trace = Trace("probed", np.array([60.0]), np.array([rate_mbps * 1e6]))
    with open_path(LinkSettings(delay_s=0.005), [trace]) as path, Prober(path.network) as prober:
        path.arm(trace, time.monotonic(), 60.0)
        found = [prober.measure() for _ in range(count)]
        path.finish()
    errors = [abs(one.capacity_bps / trace.peak_bps - 1.0) for one in found]
    what = f"{rate_mbps:g} Mbit/s: "
    return [
        Value(what + "median error", median(errors), "fraction", 0.03),
        Value(what + "largest error", max(errors), "fraction"),
        Value(what + "round trip of 10 ms, median off by", abs(median(one.rtt_s for one in found) - 0.01) * 1e3, "ms"),
    ]


# ---- the rest ---------------------------------------------------------------------------------------------------


def setup(table: Table, small: bool) -> None:
    def measure() -> list[Value]:
        sandboxes, ups, downs = [], [], []
        for _ in range(3 if small else 10):
            start_s = time.monotonic()
            assert sandbox.run(["true"]) == 0
            sandboxes.append(time.monotonic() - start_s)
            start_s = time.monotonic()
            with open_path(LinkSettings(delay_s=0.02)):
                up_s = time.monotonic()
            ups.append(up_s - start_s)
            downs.append(time.monotonic() - up_s)
        return [
            Value("namespaces made, `true` run in them, and gone: slowest", max(sandboxes), "s"),
            Value("network, delay and shaper up: slowest", max(ups), "s", 1.0),
            Value("down: slowest", max(downs), "s", 0.5),
        ]

    table.steady("setup", measure)


def sharing(table: Table, small: bool) -> None:
    table.steady("sharing", lambda: shared(3.0 if small else 10.0))


def shared(length_s: float) -> list[Value]:
    trace = Trace("100M", np.array([1.0]), np.array([100e6]), end="hold")
    with open_path(LinkSettings(), [trace], receivers=2) as path:
        network = path.network
        server = traffic.start_server(network, network.sender, network.sender_ip)
        t0_s = time.monotonic()
        path.arm(trace, t0_s, length_s + 5.0)
        clients = [
            traffic.start_pull(network, host, network.sender_ip, seconds=length_s + 2.0)
            for host in network.receiver_hosts
        ]
        results = [traffic.result_of(client) for client in clients]
        path.finish()
        traffic.end(server)
    shares = [traffic.rate_between(result, t0_s + 1.5, t0_s + length_s) for result in results]
    allowed = 100e6 * goodput_per_capacity(1500)
    return [
        *(Value(f"receiver {i + 1} of two on 100 Mbit/s", share / 1e6, "Mbit/s") for i, share in enumerate(shares)),
        Value("their sum against the capacity: off by", abs(sum(shares) / allowed - 1.0), "fraction", 0.02),
    ]


def quiet(table: Table, small: bool) -> None:
    wrong = [f"{rate:.1f} Gbit/s: {verdict.reasons}" for rate, verdict in judged_sessions(small) if not verdict.ok]
    table.once("quiet", Value(f"of {SESSIONS // (4 if small else 1)} sessions alone, not valid", len(wrong), "", 0))
    print(*wrong, sep="\n", end="\n" if wrong else "", flush=True)


def crowded(table: Table, small: bool) -> None:
    missed = [f"{rate:.1f} Gbit/s" for rate, verdict in judged_sessions(small) if verdict.state == "valid"]
    what = f"of {SESSIONS // (4 if small else 1)} sessions beside programs that take every core, valid"
    table.once("crowded", Value(what, len(missed), "", 0))


def judged_sessions(small: bool) -> Iterator[tuple[float, Fidelity]]:
    """(Gbit/s, verdict) of sessions of a second."""
    for rate in np.geomspace(*SESSION_GBPS, SESSIONS // (4 if small else 1)).tolist():
        trace = Trace("session", np.array([1.0]), np.array([rate * 1e9]), end="hold")
        yield rate, replay(trace, LinkSettings(delay_s=0.005), 1.0).verdict


@contextlib.contextmanager
def neighbours() -> Iterator[None]:
    """Programs of somebody else, outside the sandbox: twice as many as cores."""
    spin = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(spin, start_new_session=True) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


PARTS: dict[str, Callable[[Table, bool], None]] = {
    "replay": replays,
    "lateness": lateness,
    "steps": steps,
    "corners": corners,
    "delay": delays,
    "loss": losses,
    "element": element,
    "probe": probe,
    "setup": setup,
    "sharing": sharing,
    "quiet": quiet,
    "crowded": crowded,
}


def measured(names: list[str], small: bool) -> dict[str, Any]:
    """Each part's rows and what it ran on. Inside a sandbox."""
    parts = {}
    uid = Path("/proc/self/uid_map").read_text().split()[1]
    print(f"{os.cpu_count()} cores, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}, uid {uid}", flush=True)
    for name in names:
        table, begin_s = Table(), time.monotonic()
        facts = {"cores": os.cpu_count(), "kernel": os.uname().release, "load": os.getloadavg()[0], "small": small}
        PARTS[name](table, small)
        parts[name] = {**facts, "took_s": round(time.monotonic() - begin_s, 1), "rows": table.rows}
    return parts


def in_a_sandbox(names: list[str], small: bool) -> dict[str, Any]:
    """The parts, measured inside."""
    if not names:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = ["--only", *names, *(["--small"] if small else []), "--out", file.name]
        if status := sandbox.run([sys.executable, __file__, *words]):
            raise SystemExit(status)
        found: dict[str, Any] = json.loads(file.read())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a few seconds a part: a look, not a claim")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="just these parts")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="extend this file by the parts measured")
    options = parser.parse_args()
    if sandbox.inside():
        options.out.write_text(json.dumps(measured(options.only, options.small)))
        return 0
    parts = in_a_sandbox([name for name in options.only if name != "crowded"], options.small)
    if "crowded" in options.only:
        with neighbours():
            parts |= in_a_sandbox(["crowded"], options.small)
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.is_file() else {}
        merged = before | parts
        options.out.write_text(json.dumps({name: merged[name] for name in PARTS if name in merged}, indent=1) + "\n")
    rows = [row for part in parts.values() for row in part["rows"]]
    missed = [row for row in rows if row["met"] is False]
    starved = sum(row["starved"] > CALM for row in rows)
    print(f"{len(rows)} rows, {len(missed)} thresholds violated, {starved} rows measured under CPU contention")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
