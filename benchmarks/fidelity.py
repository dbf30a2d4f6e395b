"""Does the emulated link do what its trace says? Replay, delay, loss, set-up, clean-up, measured against bars.

    python benchmarks/fidelity.py [--small] [--kills N] [--out FILE.json] [--only PART ...]

Everything runs in a sandbox, as root or not. Parts: replay, lateness, steps, delay (with cpu), loss, setup, sharing.
`steps` also drives Mininet's own `TCLink.config` through the same rates, and both are measured at the receiver. What
else runs on the machine shows in the numbers, so the load is printed with them. `--small` is for a look, not a claim.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from testbed.emulator import sandbox, traffic  # noqa: E402
from testbed.emulator.fidelity import expected_bytes, windows  # noqa: E402
from testbed.emulator.link import LinkSettings  # noqa: E402
from testbed.emulator.measure import Measurement, replay  # noqa: E402
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
STEPS_S = (0.01, 0.05, 0.1, 1.0)
STEP_RATES_MBPS = (20.0, 200.0)
STEP_LINK = LinkSettings(queue_bytes=2_500_000, offloads=False)
"""A queue that stays, as in Mininet, and single packets, so that the receiver's counter counts what the shaper does."""
DELAYS_MS = (1, 5, 20, 80, 200)
LOSSES = (0.001, 0.01, 0.1)


class Table:
    """Rows of (part, what, value, bar, whether it was met), printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, what: str, value: float, unit: str, bar: float | None = None) -> None:
        met = None if bar is None else bool(value <= bar)
        self.rows.append({"part": part, "what": what, "value": value, "unit": unit, "bar": bar, "met": met})
        scale, shown = (100.0, "%") if unit == "fraction" else (1.0, unit)
        bar_text = "" if bar is None else f"<= {bar * scale:g} {shown}   {'ok' if met else 'MISSED'}"
        print(f"{part:9} {what:58} {value * scale:10.3f} {shown:6} {bar_text}", flush=True)


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
        done = replay(trace, LinkSettings(), 5.0 if small else 20.0)
        report_replay(table, "replay", name, done, trace, median_bar, p95_bar)


def report_replay(
    table: Table, part: str, name: str, done: Measurement, trace: Trace, median_bar: float, p95_bar: float | None
) -> None:
    found = windows(done.record, expected_bytes(done.record, trace), 0.1)
    errors = np.abs([window.error for window in found])
    delivered = sum(window.delivered_bytes for window in found)
    carried = sum(window.expected_bytes for window in found)
    table.add(
        part, f"{name}: median error of 100 ms windows ({len(found)})", float(np.median(errors)), "fraction", median_bar
    )
    table.add(part, f"{name}: 95th percentile of it", float(np.percentile(errors, 95)), "fraction", p95_bar)
    table.add(part, f"{name}: error of all bytes while backlogged", abs(delivered / carried - 1.0), "fraction", 0.005)
    table.add(part, f"{name}: waited for processors of others", done.verdict.starved, "s/s")
    if done.goodput_per_trace is not None:
        table.add(part, f"{name}: goodput of one TCP flow against the trace", done.goodput_per_trace, "fraction")


def lateness(table: Table, small: bool) -> None:
    """Changes every 50 ms while sender and receiver keep every core busy."""
    draw = np.random.default_rng(5)
    count = 60 if small else 400
    trace = Trace("late", np.full(count, 0.05), draw.uniform(20e6, 200e6, count))
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
    table.add("lateness", f"rate changes, all cores busy: median ({len(late)})", float(np.median(late)), "ms")
    table.add("lateness", "rate changes, all cores busy: p99", float(np.percentile(late, 99)), "ms", 0.5)
    errors = [abs(window.error) for window in windows(record, expected_bytes(record, trace), 0.1)]
    table.add("lateness", "median error of 100 ms windows meanwhile", float(np.median(errors)), "fraction")
    table.rows[-1]["scheduling"] = record.settings["scheduling"]


def steps(table: Table, small: bool) -> None:
    """The same random rates through our shaper and through Mininet's TCLink.config, both measured at the receiver."""
    for step_s in STEPS_S:
        count = max(int((2.0 if small else 6.0) / step_s), 4)
        rates = np.random.default_rng(3).uniform(*STEP_RATES_MBPS, count) * 1e6
        trace = Trace("steps", np.full(count, step_s), rates)
        for name, drive in (("ours", drive_ours), ("TCLink.config", drive_mininet)):
            begin_s, arrived, late = drive(trace)
            times, sums = zip(*arrived, strict=True)
            received = np.diff(np.interp(begin_s + np.arange(count + 1) * step_s, times, sums))
            wanted = rates / 8.0 * step_s
            error = np.abs(received / wanted - 1.0)
            what = f"steps of {step_s * 1e3:g} ms, {name}: "
            table.add("steps", what + "median error of a step", float(np.median(error)), "fraction")
            table.add("steps", what + "p90", float(np.percentile(error, 90)), "fraction")
            table.add("steps", what + "of all bytes", abs(float(received.sum() / wanted.sum()) - 1.0), "fraction")
            table.add("steps", what + "lateness p99", float(np.percentile(late, 99)) * 1e3, "ms")


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
due, end = time.monotonic(), time.monotonic() + float(sys.argv[1])
while due < end:
    with open("/sys/class/net/receiver0-left/statistics/rx_bytes") as file:
        print(time.monotonic(), int(file.read()))
    due += 0.002
    time.sleep(max(due - time.monotonic(), 0.0))
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
    time.sleep(0.3)
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
    trace = Trace("2G", [1.0], [2e9], end="hold")
    plain: dict[str, float] = {}
    for delay_ms in (0, *DELAYS_MS):
        link = LinkSettings(delay_s=delay_ms * 1e-3)
        bar = max(0.5, 0.02 * delay_ms)
        with Network(link, traces=[trace]) as network, Shaper(network) as shaper:
            back = (network.receiver, network.sender, network.sender_ip)
            there = (network.sender, network.receiver, network.receiver_ips[0])
            quiet = {"there": one_way(network, *there, count), "back": one_way(network, *back, count)}
            server = traffic.start_server(network, network.sender, network.sender_ip)
            client = traffic.start_pull(network, network.receiver, network.sender_ip, seconds=60.0)
            time.sleep(0.5 + 30 * link.delay_s)
            shaper.arm(trace, time.monotonic(), 60.0)
            before = cpu_of_element(network)
            quiet["back, 2 Gbit/s there"] = one_way(network, *back, count)
            spent = cpu_of_element(network) - before
            record = shaper.finish()
            with busy(network, 2 * max(os.cpu_count() or 1, 2)):
                shaper.arm(trace, time.monotonic(), 60.0)
                quiet["back, 2 Gbit/s there, cores busy"] = one_way(network, *back, count)
                shaper.finish()
            for process in (client, server):
                traffic.end(process)
        backend = "none" if network.impairments is None else network.impairments.backend
        for name, found in quiet.items():
            median_ms = float(np.median(found)) * 1e3
            if delay_ms == 0:
                plain[name] = median_ms
                continue
            loaded = "cores busy" in name
            what = f"{delay_ms} ms ({backend}), {name}: "
            off = abs(median_ms - plain[name] - delay_ms)
            table.add("delay", what + "off by (median)", off, "ms", None if loaded else bar)
            spread = float(np.percentile(found, 99) - np.median(found)) * 1e3
            table.add("delay", what + "jitter p99", spread, "ms", 2.0 if loaded else None)
        if delay_ms:
            rate = record.delivered_bytes * 8.0 / record.length_s / 1e9
            shaper_share = record.settings["shaper_cpu_s"] / record.length_s
            share = spent / record.length_s
            table.add(
                "cpu",
                f"{delay_ms} ms: shaper, counters and element at {rate:.2f} Gbit/s",
                share + shaper_share,
                "cores",
                0.25,
            )


def cpu_of_element(network: Network) -> float:
    return 0.0 if network.impairments is None else float(network.impairments.report().get("cpu_s", 0.0))


def losses(table: Table, small: bool) -> None:
    """Numbered datagrams of one MTU; the bar is three binomial sigma."""
    for loss in LOSSES:
        count = int((100 if small else 1100) / loss)
        with Network(LinkSettings(loss=loss, seed=11)) as network:
            before = received_packets(network)
            start_s = time.monotonic()
            network.run(network.sender, [sys.executable, "-c", FLOOD, network.receiver_ips[0], str(count), "30000"])
            spent_s = time.monotonic() - start_s
            time.sleep(0.5)
            arrived = received_packets(network) - before
            assert network.impairments is not None
            report = network.impairments.report()
        lost = count - arrived
        sigma = (count * loss * (1.0 - loss)) ** 0.5
        what = (
            f"{loss:.1%} of {count} packets ({report['backend']}, {count / spent_s / 1e3:.0f}k a second): {lost} lost"
        )
        table.add("loss", what + ", off by", abs(lost - count * loss) / sigma, "sigma", 3.0)


def received_packets(network: Network) -> int:
    """UDP datagrams that reached the receiver's stack."""
    lines = network.run(network.receiver, ["cat", "/proc/net/snmp"]).splitlines()
    names, values = (line.split() for line in lines if line.startswith("Udp:"))
    counters = dict(zip(names[1:], map(int, values[1:]), strict=True))
    return counters["InDatagrams"] + counters["NoPorts"] + counters["InErrors"]


# ---- the rest ---------------------------------------------------------------------------------------------------


def setup(table: Table, small: bool) -> None:
    ups, downs = [], []
    for _ in range(3 if small else 10):
        start_s = time.monotonic()
        with Network(LinkSettings(delay_s=0.02)) as network, Shaper(network):
            up_s = time.monotonic()
        ups.append(up_s - start_s)
        downs.append(time.monotonic() - up_s)
    table.add("setup", f"network, delay and shaper up: slowest of {len(ups)}", max(ups), "s", 1.0)
    table.add("setup", "down", max(downs), "s", 0.5)


def sharing(table: Table, small: bool) -> None:
    trace = Trace("100M", [1.0], [100e6], end="hold")
    length_s = 3.0 if small else 10.0
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
    what = f"two receivers ({shares[0] / 1e6:.1f} + {shares[1] / 1e6:.1f} Mbit/s): sum off by"
    table.add("sharing", what, abs(sum(shares) / allowed - 1.0), "fraction", 0.02)


def kills(table: Table, count: int) -> None:
    """Runs of which one process is killed at a random moment; what is left two seconds after the run's end."""
    program = "import sys; from testbed.emulator import sandbox; sys.exit(sandbox.run(sys.argv[1:]))"
    inner = (
        "from testbed.emulator.measure import replay; from testbed.emulator.link import LinkSettings;"
        "from traces.resolve import open_trace;"
        "replay(open_trace('constant,rate=20Mbps'), LinkSettings(delay_s=0.005), 1.5)"
    )
    left = hung = 0
    slowest_s = 0.0
    links, spaces = set(os.listdir("/sys/class/net")), namespaces()
    for number in range(count):
        draw = random.Random(number)
        mark = f"KVSTREAM_KILL_{uuid.uuid4().hex}"
        environment = os.environ | {
            mark: "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", program, sys.executable, "-c", inner],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0.02, 2.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(marked(mark) or [process.pid]), signal.SIGKILL)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            hung += 1
            process.kill()
            process.wait()
        ended_s = time.monotonic()
        while marked(mark) and time.monotonic() - ended_s < 2.0:
            time.sleep(0.005)
        slowest_s = max(slowest_s, time.monotonic() - ended_s)
        left += len(marked(mark))
    time.sleep(0.5)
    left += len(set(os.listdir("/sys/class/net")) - links)
    table.add("kills", f"{count} runs: processes and interfaces left", left, "", 0)
    table.add(
        "kills", "network namespaces more than before, in processes of this user", len(namespaces() - spaces), "", 0
    )
    table.add("kills", "runs that hung", hung, "", 0)
    table.add("kills", "slowest clean-up", slowest_s, "s", 0.5)


def marked(mark: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
    return found


def namespaces() -> set[str]:
    """Network namespaces with a living process whose environment carries this benchmark's mark."""
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and b"KVSTREAM_KILL_" in Path(f"/proc/{name}/environ").read_bytes():
                found.add(os.readlink(f"/proc/{name}/ns/net"))
    return found


PARTS: dict[str, Callable[[Table, bool], None]] = {
    "replay": replays,
    "lateness": lateness,
    "steps": steps,
    "delay": delays,
    "loss": losses,
    "setup": setup,
    "sharing": sharing,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a few seconds a part: a look, not a claim")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="also kill N runs at random moments")
    parser.add_argument("--only", nargs="*", choices=[*PARTS], help="just these parts")
    parser.add_argument("--out", metavar="FILE.json", help="also write the table as JSON")
    args = parser.parse_args()
    table = Table()
    if not sandbox.inside():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            words = [word for word in sys.argv[1:] if word not in ("--out", args.out)]
            status = sandbox.run([sys.executable, __file__, *words, "--out", file.name])
            if status > 1:
                return status
            table.rows = json.loads(file.read())["rows"]
        if args.kills:
            kills(table, args.kills)
    else:
        machine = f"{os.cpu_count()} cores, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}"
        print(f"{machine}, uid map {Path('/proc/self/uid_map').read_text().split()[1]}")
        for name in args.only if args.only is not None else PARTS:
            PARTS[name](table, args.small)
    if args.out:
        facts = {"cores": os.cpu_count(), "kernel": os.uname().release, "load": os.getloadavg(), "small": args.small}
        Path(args.out).write_text(json.dumps({**facts, "rows": table.rows}, indent=1))
    return 1 if any(row["met"] is False for row in table.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
