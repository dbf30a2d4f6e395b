"""Plain TCP traffic over an emulated link: what measures it, and what competes on it.

    python -m kvstream.testbed.emulator.traffic serve ADDRESS PORT           sends to whoever asks, prints `ready`
    python -m kvstream.testbed.emulator.traffic pull ADDRESS PORT BYTES SECONDS
    python -m kvstream.testbed.emulator.traffic pour ADDRESS PORT MTU        datagrams at rates that it is told
    python -m kvstream.testbed.emulator.traffic drain PORT                   takes datagrams and does nothing with them

`pull` asks for BYTES (0: as many as come), stops after SECONDS and prints one JSON line: `start_s` (CLOCK_MONOTONIC, of
the request), `bytes`, and `arrivals`, a list of [seconds since start_s, bytes so far] at least 1 ms apart.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstream.testbed.host.json_lines import Requests

if TYPE_CHECKING:
    from kvstream.testbed.emulator.topology import Network

BLOCK: Final = bytes(1 << 18)
NOTSENT_BYTES: Final = 1 << 18
"""Little more than this waits in the sender's kernel, so that an ended transfer ends soon."""
ARRIVAL_S: Final = 0.001


def serve(address: str, port: int) -> None:
    """Send the bytes that each connection asks for in its first 8 bytes, until killed."""
    with socket.create_server((address, port), backlog=64) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_send, args=(connection,), daemon=True).start()


def _send(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_BYTES)
        try:
            wanted = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big") or 1 << 62
            while wanted > 0:
                block = BLOCK if wanted >= len(BLOCK) else BLOCK[:wanted]
                connection.sendall(block)
                wanted -= len(block)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        except OSError:
            pass  # the other side has had enough


def pull(address: str, port: int, wanted_bytes: int, seconds: float) -> dict[str, Any]:
    """Receive as described above."""
    buffer = bytearray(1 << 20)
    arrivals: list[tuple[float, int]] = []
    received, last_s = 0, 0.0
    with socket.create_connection((address, port), timeout=10.0) as connection:
        start_s = time.monotonic()
        connection.sendall(wanted_bytes.to_bytes(8, "big"))
        while (left := start_s + seconds - time.monotonic()) > 0.0:
            connection.settimeout(left)
            try:
                count = connection.recv_into(buffer)
            except TimeoutError:
                break
            received += count
            now = time.monotonic() - start_s
            if count == 0 or now - last_s >= ARRIVAL_S:
                arrivals.append((now, received))
                last_s = now
            if count == 0:
                break
    return {"start_s": start_s, "bytes": received, "arrivals": arrivals}


def pour(address: str, port: int, mtu: int) -> None:
    """Send datagrams of one MTU. Each line of input is a list of [CLOCK_MONOTONIC, bit/s at layer 2] steps, which
    replaces the one before; an empty list stops. Paced in milliseconds, for rates up to some 500 Mbit/s."""
    payload = bytes(mtu - 28)
    frame_bits = (mtu + 14) * 8
    steps: list[list[float]] = []
    requests = Requests()
    owed = rate = 0.0
    last_s = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect((address, port))
        while True:
            if select.select([requests], [], [], 0.001 if steps or rate else None)[0]:
                asked = requests.read()
                if asked is None:
                    return
                for told in asked:
                    steps, owed, rate, last_s = told, 0.0, 0.0, time.monotonic()
            now = time.monotonic()
            while steps and steps[0][0] <= now:
                due_s, next_rate = steps.pop(0)
                owed += rate * max(due_s - last_s, 0.0)
                last_s, rate = max(due_s, last_s), next_rate
            owed += rate * (now - last_s)
            last_s = now
            while owed >= frame_bits:
                owed -= frame_bits
                with contextlib.suppress(OSError):  # a full queue, or nobody there yet
                    out.send(payload)


def drain(port: int) -> None:
    """Hold a port open, so that datagrams to it are not answered with errors."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sink.bind(("", port))
        print("ready", flush=True)
        signal.pause()


def start_server(network: Network, host: Any, address: str, port: int = 5001) -> subprocess.Popen[str]:
    """`serve` on a host of a network, ready for connections."""
    server = network.popen(
        host,
        [sys.executable, "-m", "kvstream.testbed.emulator.traffic", "serve", address, str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    if server.stdout.readline() != "ready\n":
        raise OSError(f"the traffic server on {host.name} did not start")
    return server


def start_pull(
    network: Network, host: Any, address: str, port: int = 5001, *, wanted_bytes: int = 0, seconds: float = 60.0
) -> subprocess.Popen[str]:
    """`pull` on a host; read its result with `result_of`."""
    return network.popen(
        host,
        [
            sys.executable,
            "-m",
            "kvstream.testbed.emulator.traffic",
            "pull",
            address,
            str(port),
            str(wanted_bytes),
            str(seconds),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a `pull` to end and return what it printed."""
    output, _ = process.communicate()
    if process.returncode != 0:
        raise OSError(f"a traffic client ended with status {process.returncode}")
    return json.loads(output)


def rate_between(result: dict[str, Any], begin_s: float, end_s: float) -> float:
    """Goodput in bit/s between two moments of CLOCK_MONOTONIC, from what a `pull` printed."""
    times = [result["start_s"], *(result["start_s"] + at_s for at_s, _ in result["arrivals"])]
    sums = [0, *(received for _, received in result["arrivals"])]
    received = np.interp([begin_s, end_s], times, sums)
    return float(received[1] - received[0]) * 8.0 / (end_s - begin_s)


def end(process: subprocess.Popen[str]) -> None:
    """Stop a server or a client and free its pipes."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "pour":
        pour(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "drain":
        drain(int(sys.argv[2]))
    else:
        print(json.dumps(pull(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))))
