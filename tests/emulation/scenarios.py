"""What the tests do inside a sandbox: `python scenarios.py RESULT NAME SETTINGS`, the settings as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvstream.testbed.config import specs
from kvstream.testbed.emulator import analysis, capture, fidelity, traffic
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.path import LinkPath, open_path
from kvstream.testbed.emulator.probe import Prober
from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.emulator.topology import Network
from kvstream.traces.trace import Trace


def link_of(text: str) -> LinkSettings:
    return specs.build(LinkSettings, specs.parse_settings(text), "link")


def trace_of(rows: list[list[float]], end: str = "hold") -> Trace:
    """A trace of [seconds, Mbit/s] rows."""
    return Trace("test", [row[0] for row in rows], [row[1] * 1e6 for row in rows], end=end)  # type: ignore[arg-type]


def backlogged(path: LinkPath, trace: Trace, length_s: float, meanwhile: Any = None) -> LinkRecord:
    """A session with as much traffic as the link takes; `meanwhile()` is called in its middle."""
    net = path.network
    server = traffic.start_server(net, net.sender, net.sender_ip)
    client = traffic.start_pull(net, net.receiver, net.sender_ip, seconds=length_s + 5.0)
    time.sleep(0.3)
    t0 = time.monotonic() + 0.05
    path.arm(trace, t0, length_s)
    if meanwhile is not None:
        time.sleep(max(t0 + length_s / 2.0 - time.monotonic(), 0.0))
        meanwhile()
    record = path.finish(t0 + length_s).down
    for program in (client, server):
        program.kill()
        program.communicate()
    return record


def verdict_of(record: LinkRecord, trace: Trace) -> dict[str, Any]:
    return {"verdict": fidelity.judge(record, trace).to_json(), "faults": list(record.faults)}


# ---- topology ---------------------------------------------------------------------------------------------------


def build(link: str = "", receivers: int = 1, senders: int = 1) -> dict[str, Any]:
    """Who reaches whom, and what was pinned."""
    reached = []
    with Network(link_of(link), receivers=receivers, senders=senders) as net:
        servers = [
            traffic.start_server(net, host, ip) for host, ip in zip(net.sender_hosts, net.sender_ips, strict=True)
        ]
        for host in net.receiver_hosts:
            for ip in net.sender_ips:
                client = traffic.start_pull(net, host, ip, wanted_bytes=5000)
                reached.append(traffic.result_of(client)["bytes"])
        for server in servers:
            server.kill()
            server.communicate()
        settings = net.settings
    after = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {"reached": reached, "settings": settings, "interfaces_after": [line.split()[0] for line in after]}


def congestion_control(cc: str) -> list[str]:
    """What live connections use at either end."""
    ask = "import socket,sys;print(s.getsockopt(6,socket.TCP_CONGESTION,16).rstrip(b'\\0').decode(),flush=True)"
    serve = f"import socket,sys;l=socket.create_server(('',7));print('ready',flush=True);s,_=l.accept();{ask};s.recv(1)"
    connect = f"import socket,sys;s=socket.create_connection((sys.argv[1],7));{ask};s.close()"
    with Network(link_of(f"cc={cc}")) as net:
        server = net.popen(net.sender, [sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        server.stdout.readline()
        client = net.run(net.receiver, [sys.executable, "-c", connect, net.sender_ip])
        return [client.strip(), server.communicate()[0].strip()]


# ---- replay -----------------------------------------------------------------------------------------------------


def transfer(rate_mbps: float, size_bytes: int) -> float:
    """Seconds that a fixed transfer takes over a constant trace."""
    trace = trace_of([[10.0, rate_mbps]])
    with open_path(LinkSettings(), [trace]) as path:
        net = path.network
        server = traffic.start_server(net, net.sender, net.sender_ip)
        path.arm(trace, time.monotonic(), 10.0)
        result = traffic.result_of(traffic.start_pull(net, net.receiver, net.sender_ip, wanted_bytes=size_bytes))
        path.finish()
        server.kill()
        server.communicate()
        assert result["bytes"] == size_bytes
        return result["arrivals"][-1][0]


def replay(rows: list[list[float]], length_s: float, link: str = "") -> dict[str, Any]:
    """A backlogged session; its record beside its verdict."""
    trace = trace_of(rows)
    with open_path(link_of(link), [trace]) as path:
        record = backlogged(path, trace, length_s)
        return {
            **verdict_of(record, trace),
            "record": record.to_json(),
            "rows": record.rows(),
            "shaper": path.down.settings,
        }


def two_sessions() -> list[dict[str, Any]]:
    """One network, one shaper, two sessions: the second starts from zero."""
    trace = trace_of([[0.2, 20], [0.2, 40], [0.2, 10]])
    with open_path(LinkSettings(), [trace]) as path:
        return [verdict_of(backlogged(path, trace, 0.6), trace) for _ in range(2)]


def tampered(how: str) -> dict[str, Any]:
    """A session in the middle of which someone else touches the link, through another program than the shaper."""
    trace = trace_of([[5.0, 20]])
    with open_path(LinkSettings(), [trace]) as path:
        net = path.network

        def tamper() -> None:
            if how == "delete":
                net.run(net.router, ["tc", "qdisc", "del", "dev", net.bottleneck, "root"])
            elif how == "rate":
                words = "htb rate 40mbit ceil 40mbit burst 10k cburst 10k quantum 60000"
                net.run(net.router, f"tc class change dev {net.bottleneck} parent 5: classid 5:1 {words}".split())
            elif how == "queue":
                words = "tbf rate 1tbit burst 1g limit 3028"
                net.run(net.router, f"tc qdisc change dev {net.bottleneck} parent 5:1 handle 6: {words}".split())
            elif how == "kill":
                subprocess.run(["kill", "-9", str(path.down.pid)], check=True)
            else:
                raise ValueError(how)

        return verdict_of(backlogged(path, trace, 1.0, tamper), trace)


def shaper_dies() -> str:
    """What a controller hears whose shaper was killed."""
    from kvstream.testbed.errors import MachineError

    try:
        tampered("kill")
    except MachineError as error:
        return str(error)
    return ""


def per_chunk(rates_mbps: list[float]) -> dict[str, Any]:
    """Steps made by the controller instead of a schedule."""
    trace = Trace("chunks", [], [rate * 1e6 for rate in rates_mbps], per="chunk")
    with open_path(LinkSettings(), [trace]) as path:
        net = path.network
        server = traffic.start_server(net, net.sender, net.sender_ip)
        client = traffic.start_pull(net, net.receiver, net.sender_ip, seconds=30.0)
        time.sleep(0.3)
        path.arm(trace, time.monotonic(), 10.0)
        for chunk in range(len(rates_mbps)):
            path.down.set_rate(trace.chunk_rate(chunk))
            time.sleep(0.3)
        record = path.finish().down
        for program in (client, server):
            program.kill()
            program.communicate()
        return {**verdict_of(record, trace), "changes": [list(change) for change in record.changes]}


def uplink() -> list[dict[str, Any]]:
    """Both directions shaped at once, with different rates: what is to be said of the way down and of the way up."""
    down = trace_of([[5.0, 30]])
    with open_path(LinkSettings(up_trace="constant,rate=10Mbps"), [down]) as path:
        net = path.network
        servers = [
            traffic.start_server(net, net.sender, net.sender_ip),
            traffic.start_server(net, net.receiver, net.receiver_ips[0]),
        ]
        t0 = time.monotonic()
        path.arm(down, t0, 4.0)
        clients = [
            traffic.start_pull(net, net.receiver, net.sender_ip, seconds=5.0),
            traffic.start_pull(net, net.sender, net.receiver_ips[0], seconds=5.0),
        ]
        done = path.finish(t0 + 4.0)
        assert done.up is not None
        assert done.up_trace is not None
        got = [verdict_of(done.down, down), verdict_of(done.up, done.up_trace)]
        for program in (*clients, *servers):
            traffic.end(program)
    return got


def contention(receivers: int) -> dict[str, Any]:
    """Several receivers on one bottleneck: what each got, and the link in all, in Mbit/s of goodput."""
    trace = trace_of([[10.0, 40]])
    with open_path(LinkSettings(), [trace], receivers=receivers) as path:
        net = path.network
        server = traffic.start_server(net, net.sender, net.sender_ip)
        t0 = time.monotonic()
        path.arm(trace, t0, 10.0)
        clients = [traffic.start_pull(net, host, net.sender_ip, seconds=3.0) for host in net.receiver_hosts]
        results = [traffic.result_of(client) for client in clients]
        record = path.finish().down
        server.kill()
        server.communicate()
    shares = []
    for result in results:
        times, sums = (np.array(column) for column in zip(*result["arrivals"], strict=True))
        begin, end = np.interp([t0 + 1.0 - result["start_s"], t0 + 2.5 - result["start_s"]], times, sums)
        shares.append(float(end - begin) * 8e-6 / 1.5)
    return {"shares_mbps": shares, **verdict_of(record, trace)}


def starved(seconds: float) -> dict[str, Any]:
    """A session beside which this run itself wants every core."""
    trace = trace_of([[10.0, 20]])
    with open_path(LinkSettings(), [trace]) as path:
        net = path.network
        spinners = [net.popen(net.receiver, [sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        record = backlogged(path, trace, seconds)
        for spinner in spinners:
            spinner.kill()
        return verdict_of(record, trace)


def beside_others(link: str, trace_file: str = "") -> dict[str, Any]:
    """What one flow gets of 40 Mbit/s beside the traffic of others, in Mbit/s of goodput, and where it runs."""
    trace = trace_of([[10.0, 40]])
    if trace_file:
        link += f",cross_trace={trace_file}"
    with open_path(link_of(link), [trace]) as path:
        net = path.network
        server = traffic.start_server(net, net.sender, net.sender_ip)
        client = traffic.start_pull(net, net.receiver, net.sender_ip, seconds=3.5)
        time.sleep(0.4)
        t0 = time.monotonic()
        path.arm(trace, t0, 2.5)
        cores = [sorted(os.sched_getaffinity(process.pid)) for process in (server, client)]
        record = path.finish(t0 + 2.5).down
        result = traffic.result_of(client)
        traffic.end(server)
    mbps = traffic.rate_between(result, t0 + 0.5, t0 + 2.5) / 1e6
    return {"mbps": mbps, "cores": cores, **verdict_of(record, trace)}


# ---- impairments ------------------------------------------------------------------------------------------------

ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 7))
print("ready", flush=True)
while True:
    data, peer = s.recvfrom(2000)
    s.sendto(data, peer)
"""

SINK = """
import json, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
s.bind(("", 9))
s.settimeout(1.0)
print("ready", flush=True)
got = []
s.settimeout(10.0)
try:
    while True:
        got.append(int.from_bytes(s.recv(2000)[:4], "big"))
        s.settimeout(1.0)
except TimeoutError:
    print(json.dumps(got))
"""

PING = """
import json, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5.0)
rtts = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    s.sendto(bytes(60), (sys.argv[1], 7))
    s.recv(100)
    rtts.append(time.perf_counter() - start)
    time.sleep(0.002)
print(json.dumps(rtts))
"""

SEND = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(int(sys.argv[2])):
    s.sendto(i.to_bytes(4, "big") + bytes(200), (sys.argv[1], 9))
    if i % 4 == 3:
        time.sleep(0.001)
"""


def round_trips(link: str, count: int = 100) -> dict[str, Any]:
    """Round-trip times of small datagrams, in seconds."""
    with open_path(link_of(link)) as path:
        net = path.network
        echo = net.popen(net.receiver, [sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        echo.stdout.readline()
        rtts = json.loads(net.run(net.sender, [sys.executable, "-c", PING, net.receiver_ips[0], str(count)]))
        echo.kill()
        echo.communicate()
        report = None if path.impairments is None else path.impairments.report()
        return {"rtts_s": rtts, "report": report, "settings": path.settings}


def changing(delays_ms: list[float], losses: list[float]) -> dict[str, Any]:
    """Round trips and losses under a trace that has columns of both, one row a half second, on top of 5 ms."""
    rows = len(delays_ms)
    trace = replace(trace_of([[0.5, 100]] * rows), delay_s=np.array(delays_ms) * 1e-3, loss=np.array(losses))
    with open_path(link_of("delay=5ms"), [trace]) as path:
        net = path.network
        echo = net.popen(net.receiver, [sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        echo.stdout.readline()
        code = (
            PING.replace("s.settimeout(5.0)", "s.settimeout(0.2)\nend = time.monotonic() + float(sys.argv[2])")
            .replace("for _ in range(int(sys.argv[2])):", "while time.monotonic() < end:")
            .replace("    s.recv(100)\n", "    try:\n        s.recv(100)\n    except TimeoutError:\n        pass\n")
            .replace("rtts.append(", "rtts.append((time.monotonic(), ")
            .replace("- start)", "- start))")
        )
        words = [sys.executable, "-c", code, net.receiver_ips[0], str(0.5 * rows)]
        ping = net.popen(net.sender, words, stdout=subprocess.PIPE, text=True)
        t0 = time.monotonic()
        path.arm(trace, t0, 0.5 * rows)
        pings = json.loads(ping.communicate()[0])
        path.finish()
        assert path.impairments is not None
        return {"pings": [[at_s - t0 - rtt_s, rtt_s] for at_s, rtt_s in pings], "report": path.impairments.report()}


def datagrams(link: str, count: int) -> dict[str, Any]:
    """Numbered datagrams toward the receiver: the numbers that arrived, in order of arrival."""
    with open_path(link_of(link)) as path:
        net = path.network
        sink = net.popen(net.receiver, [sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
        assert sink.stdout is not None
        sink.stdout.readline()
        net.run(net.sender, [sys.executable, "-c", SEND, net.receiver_ips[0], str(count)])
        arrived = json.loads(sink.communicate()[0])
        report = None if path.impairments is None else path.impairments.report()
        return {"arrived": arrived, "report": report}


# ---- capture and probe ------------------------------------------------------------------------------------------


def captured(
    link: str, folder: str, recorder: Literal["tcpdump", "sniff"] | None = None, senders: int = 1
) -> dict[str, Any]:
    """A captured session: what the capture and the counters say of the same stretch of time. All senders send."""
    if recorder is not None:
        capture.recorder = lambda: recorder
    trace = trace_of([[0.5, 20], [0.5, 40]])
    with (
        open_path(link_of(link), [trace], senders=senders) as path,
        capture.capture(path.network, Path(folder)) as captures,
    ):
        net = path.network
        for host, ip in list(zip(net.sender_hosts, net.sender_ips, strict=True))[1:]:
            traffic.start_server(net, host, ip)
            traffic.start_pull(net, net.receiver, ip)
        record = backlogged(path, trace, 1.0)
    found = analysis.analyse(captures, net.sender_ips)
    begin, end = record.t0_s + record.samples[0].t_s, record.t0_s + record.samples[-1].t_s
    chunks = [{"chunk": 0, "request_s": 0.1, "last_byte_s": 0.4}, {"chunk": 1}]
    return {
        "counted": record.samples[-1].delivered_bytes,
        "captured": found.frames_between(begin, end),
        "dropped": [capture.dropped for capture in captures.values()],
        "windows": found.windows(record.t0_s, record.t0_s + 1.0),
        "chunks": found.chunks(chunks, record.t0_s),
        "retransmitted": found.retransmitted_bytes / max(found.sent_bytes, 1),
        "least_rtt_s": float(found.rtt_s.min()),
        "summary": found.summary(record, alone=True),
    }


def probed(link: str, rates_mbps: list[float]) -> list[list[float]]:
    """What the probe makes of constant links: (capacity, rtt) each."""
    found = []
    for rate in rates_mbps:
        trace = trace_of([[60, rate]])
        with open_path(link_of(link), [trace]) as path, Prober(path.network) as prober:
            path.arm(trace, time.monotonic(), 60.0)
            estimate = prober.measure()
            path.finish()
            found.append([estimate.capacity_bps, estimate.rtt_s])
    return found


if __name__ == "__main__":
    out, name, settings = sys.argv[1:]
    result = globals()[name](**json.loads(settings))
    Path(out).write_text(json.dumps(result))
