"""Does the emulated link do what its trace says? Replay, delay, loss, probe, set-up, sharing, measured against bars.

    python benchmarks/fidelity.py [--only PART ...] [--out FILE.json] [--small]

Everything runs in a sandbox, as root or not. Parts: replay, lateness, steps, delay (with the cost in CPU), loss,
element (how much ours takes), probe, setup, sharing; all take about 10 minutes. With --out the file is extended: parts
that are measured again replace their old rows, others stay, so that the table can be made in pieces. `steps` also
drives Mininet's own `TCLink.config` through the same rates, and both are measured at the receiver.

A measurement during which the run had to wait for processors that others had says little about the link: it is made
again, up to three times, and the median of the undisturbed ones counts. Where all were disturbed, the row says so.
`--small` is for a look, not a claim. What a killed run leaves behind is `benchmarks/kills.py`.
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

from testbed.emulator import sandbox, traffic  # noqa: E402
from testbed.emulator.clock import CpuMeter  # noqa: E402
from testbed.emulator.fidelity import expected_bytes, windows  # noqa: E402
from testbed.emulator.link import LinkSettings  # noqa: E402
from testbed.emulator.measure import replay  # noqa: E402
from testbed.emulator.probe import Prober  # noqa: E402
from testbed.emulator.record import LinkRecord  # noqa: E402
from testbed.emulator.shaper import Shaper  # noqa: E402
from testbed.emulator.topology import Network  # noqa: E402
from traces.framing import goodput_per_capacity  # noqa: E402
from traces.resolve import open_trace  # noqa: E402
from traces.trace import Trace  # noqa: E402

REPLAYS = {
    "uniform 0.1-10 Gbit/s, held 0.2 s": ("uniform,low=100Mbps,high=10Gbps,hold=0.2s,seed=7", 0.01, 0.04),
    "uniform 2-50 Mbit/s, held 0.2 s": ("uniform,low=2Mbps,high=50Mbps,hold=0.2s,seed=7", 0.015, None),
    "LTE-like walk": ("lte-walk", 0.015, None),
}
"""Trace, bar on the median error of 100 ms windows, bar on their 95th percentile."""
TOTAL_BAR = 0.005
"""On the error of all bytes, while backlogged and of the whole replay."""
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
"""Packets a second."""
PROBED_MBPS = (10.0, 100.0, 1000.0)
TRIES = 3
CALM = 0.05
"""Seconds a second that a measurement's processes may wait for processors that others have."""
WATCH_S = 0.25


@dataclass(frozen=True)
class Value:
    """One number, and the most it may be."""

    what: str
    value: float
    unit: str
    bar: float | None = None


@contextlib.contextmanager
def watching() -> Iterator[list[float]]:
    """Sum up how long processes of this sandbox wait for processors that others have, while the context lasts."""
    starved_s, over = [0.0], threading.Event()

    def watch() -> None:
        meter = CpuMeter()
        while not over.wait(WATCH_S):
            _, own, foreign, waited = meter.read()
            starved_s[0] += waited * foreign / max(own + foreign, 1e-9)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield starved_s
    finally:
        over.set()
        watcher.join()


class Table:
    """Rows of (part, what, value, bar, whether it was met), printed as they come."""

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

    def _add(self, part: str, what: Value, value: float, starved: float, tries: int) -> None:
        met = None if what.bar is None else bool(value <= what.bar)
        self.rows.append({"part": part, **asdict(what), "value": value, "met": met, "starved": starved, "tries": tries})
        scale, shown = (100.0, "%") if what.unit == "fraction" else (1.0, what.unit)
        bar = "" if what.bar is None else f"<= {what.bar * scale:g} {shown}   {'ok' if met else 'MISSED'}"
        note = "" if starved <= CALM else f"   (waited {starved:.2f} s a second for others' processors, {tries} tries)"
        print(f"{part:9} {what.what:62} {value * scale:10.3f} {shown:6} {bar}{note}", flush=True)


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
    for name, (spec, median_bar, p95_bar) in REPLAYS.items():
        trace = open_trace(spec)

        def measure(trace: Trace = trace, bars: Any = (median_bar, p95_bar), name: str = name) -> list[Value]:
            length_s = 5.0 if small else 20.0
            done = replay(trace, LinkSettings(), length_s)
            assert done.goodput_per_trace is not None
            off = abs(done.goodput_per_trace - 1.0)
            return [
                *against_trace(name, done.record, trace, *bars),
                Value(f"{name}: goodput of one TCP flow against the trace", done.goodput_per_trace, "fraction"),
                Value(f"{name}: all bytes of {length_s:g} s", off, "fraction", TOTAL_BAR),
            ]

        table.steady("replay", measure)


def against_trace(
    name: str, record: LinkRecord, trace: Trace, median_bar: float | None, p95_bar: float | None
) -> list[Value]:
    """What the class delivered while it was backlogged, against what the trace carries."""
    found = windows(record, expected_bytes(record, trace), 0.1)
    errors = np.abs([window.error for window in found])
    delivered = sum(window.delivered_bytes for window in found)
    carried = sum(window.expected_bytes for window in found)
    return [
        Value(f"{name}: median error of 100 ms windows", float(np.median(errors)), "fraction", median_bar),
        Value(f"{name}: 95th percentile of it", float(np.percentile(errors, 95)), "fraction", p95_bar),
        Value(f"{name}: error of all bytes while backlogged", abs(delivered / carried - 1.0), "fraction", TOTAL_BAR),
        Value(f"{name}: windows", len(found), ""),
    ]


def lateness(table: Table, small: bool) -> None:
    """Changes every 50 ms while sender and receiver keep every core busy."""
    count = 60 if small else 400
    trace = Trace("late", np.full(count, 0.05), np.random.default_rng(5).uniform(20e6, 200e6, count))

    def measure() -> list[Value]:
        with Network(LinkSettings(), traces=[trace]) as network, Shaper(network) as shaper:
            server = traffic.start_server(network, network.sender, network.sender_ip)
            client = traffic.start_pull(network, network.receiver, network.sender_ip, seconds=count * 0.05 + 1.0)
            with busy(network, 2 * max(os.cpu_count() or 1, 2)):
                time.sleep(0.5)
                t0_s = time.monotonic() + 0.05
                shaper.arm(trace, t0_s, count * 0.05)
                record = shaper.finish(t0_s + count * 0.05)
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

    def watch(network: Network, length_s: float, shaper: Shaper) -> None:
        t0_s = time.monotonic() + 0.05
        shaper.arm(trace, t0_s, length_s)
        record = shaper.finish(t0_s + length_s)
        found.update(begin_s=t0_s, late=record.lateness_s)

    with Network(STEP_LINK, traces=[trace]) as network, Shaper(network) as shaper:
        arrived = filled(network, trace.duration_s, lambda: watch(network, trace.duration_s, shaper))
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


WATCH = """
import sys, time
from testbed.emulator.clock import be_punctual
be_punctual(light=True)
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
    # A queue of a round trip keeps the link full while flows recover from a drop; the way back does not pass it.
    link = LinkSettings(delay_s=delay_ms * 1e-3, queue_s=max(0.05, 2e-3 * delay_ms))
    flows = math.ceil(max(2e9 / 8.0 * 2.0 * link.delay_s / FLOW_BYTES, 1.0))
    with Network(link, traces=[trace]) as network, Shaper(network) as shaper:
        back = (network.receiver, network.sender, network.sender_ip)
        there = (network.sender, network.receiver, network.receiver_ips[0])
        found = {"there": one_way(network, *there, count), "back": one_way(network, *back, count)}
        server = traffic.start_server(network, network.sender, network.sender_ip)
        clients = [
            traffic.start_pull(network, network.receiver, network.sender_ip, seconds=120.0) for _ in range(flows)
        ]
        ramp_up(network, float(trace.rates_bps[0]))
        shaper.arm(trace, time.monotonic(), 60.0)
        before = cpu_of_element(network)
        found["back, 2 Gbit/s there"] = one_way(network, *back, count)
        spent_s = cpu_of_element(network) - before
        record = shaper.finish()
        with busy(network, 2 * max(os.cpu_count() or 1, 2)):
            shaper.arm(trace, time.monotonic(), 60.0)
            found["back, 2 Gbit/s there, cores busy"] = one_way(network, *back, count)
            shaper.finish()
        for process in (*clients, server):
            traffic.end(process)
        backend = "none" if network.impairments is None else network.impairments.backend
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


def cpu_of_element(network: Network) -> float:
    return 0.0 if network.impairments is None else float(network.impairments.report().get("cpu_s", 0.0))


def losses(table: Table, small: bool) -> None:
    """Numbered datagrams of one MTU; the bar is three binomial sigma."""
    for loss in LOSSES:
        table.steady("loss", lambda loss=loss: lost(loss, int((100 if small else 1100) / loss)))  # type: ignore[misc]


def lost(loss: float, count: int) -> list[Value]:
    with Network(LinkSettings(loss=loss, seed=11)) as network:
        before = received_packets(network)
        start_s = time.monotonic()
        network.run(network.sender, [sys.executable, "-c", FLOOD, network.receiver_ips[0], str(count), "30000"])
        spent_s = time.monotonic() - start_s
        time.sleep(0.5)
        missing = count - (received_packets(network) - before)
        assert network.impairments is not None
        what = f"{loss:.1%} of {count} packets ({network.impairments.backend}): "
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
            assert network.impairments is not None
            start_s = time.monotonic()
            network.run(network.sender, [sys.executable, "-c", FLOOD, network.receiver_ips[0], str(count), str(rate)])
            spent_s = time.monotonic() - start_s
            lane = network.impairments.report()["lanes"][0]
        if lane["lost_by_kernel"] or lane["packets"] < 0.99 * count:
            break
        kept = max(kept, count / spent_s)
    return [Value("single packets, none lost by the kernel", kept / 1e3, "k/s")]


def groups(length_s: float) -> list[Value]:
    """What TCP gets through a delay of 5 ms where nothing else limits it."""
    with Network(LinkSettings(delay_s=0.005, impair="nfqueue")) as network:
        assert network.impairments is not None
        server = traffic.start_server(network, network.sender, network.sender_ip)
        clients = [
            traffic.start_pull(network, network.receiver, network.sender_ip, seconds=length_s + 1.5) for _ in range(2)
        ]
        begin_s = time.monotonic() + 1.0
        results = [traffic.result_of(client) for client in clients]
        rate = sum(traffic.rate_between(result, begin_s, begin_s + length_s) for result in results)
        lost = sum(lane["lost_by_kernel"] for lane in network.impairments.report()["lanes"])
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
    network = Network(LinkSettings(delay_s=0.005), traces=[trace])
    with network, Shaper(network) as shaper, Prober(network) as prober:
        shaper.arm(trace, time.monotonic(), 60.0)
        found = [prober.measure() for _ in range(count)]
        shaper.finish()
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
            with Network(LinkSettings(delay_s=0.02)) as network, Shaper(network):
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
    with Network(LinkSettings(), receivers=2, traces=[trace]) as network, Shaper(network) as shaper:
        server = traffic.start_server(network, network.sender, network.sender_ip)
        t0_s = time.monotonic()
        shaper.arm(trace, t0_s, length_s + 5.0)
        clients = [
            traffic.start_pull(network, host, network.sender_ip, seconds=length_s + 2.0)
            for host in network.receiver_hosts
        ]
        results = [traffic.result_of(client) for client in clients]
        shaper.finish()
        traffic.end(server)
    shares = [traffic.rate_between(result, t0_s + 1.5, t0_s + length_s) for result in results]
    allowed = 100e6 * goodput_per_capacity(1500)
    return [
        *(Value(f"receiver {i + 1} of two on 100 Mbit/s", share / 1e6, "Mbit/s") for i, share in enumerate(shares)),
        Value("their sum against the capacity: off by", abs(sum(shares) / allowed - 1.0), "fraction", 0.02),
    ]


PARTS: dict[str, Callable[[Table, bool], None]] = {
    "replay": replays,
    "lateness": lateness,
    "steps": steps,
    "delay": delays,
    "loss": losses,
    "element": element,
    "probe": probe,
    "setup": setup,
    "sharing": sharing,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a few seconds a part: a look, not a claim")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="just these parts")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="extend this file by the parts measured")
    options = parser.parse_args()
    if sandbox.inside():
        options.out.write_text(json.dumps(measured(options.only, options.small)))
        return 0
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = ["--only", *options.only, *(["--small"] if options.small else []), "--out", file.name]
        status = sandbox.run([sys.executable, __file__, *words])
        if status:
            return status
        parts = json.loads(file.read())
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.is_file() else {}
        merged = before | parts
        options.out.write_text(json.dumps({name: merged[name] for name in PARTS if name in merged}, indent=1) + "\n")
    rows = [row for part in parts.values() for row in part["rows"]]
    missed = [row for row in rows if row["met"] is False]
    starved = sum(row["starved"] > CALM for row in rows)
    print(f"{len(rows)} rows, {len(missed)} bars missed, {starved} rows measured while others had the processors")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
