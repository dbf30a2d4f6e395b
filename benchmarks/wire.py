"""What carrying a cache costs the stream's two ends: CPU time per byte and rate, compared with a plain socket.

    python benchmarks/wire.py [--sessions N] [--out FILE.json]

Whole sessions over loopback, from a sender's process to this one, of a synthetic context whose decoding costs nothing:
7 chunks of 14.65 MB, as of a 7B model. `plain` is the floor: a loop of `sendall` in the other process, one of
`recv_into` here. `stream` receives in this process, `process` in one of its own, as beside a GPU
(kvstream.testbed.net.network_process). `busy` has a thread beside it that holds the interpreter lock for 60 us at a
time, a third to a half of the time, as one that launches kernels does. Printed are medians over sessions: Gbit/s of
compressed bytes, CPU seconds per GiB of either end, their ratios to `plain` in the same run, and KiB per read of this
process. The sender has the last processor for itself and this process the others, lest the scheduler put both on one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvstream.policies.api import TEXT
from kvstream.policies.fixed import Fixed
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.buffers import ChunkBuffers, IncomingChunk
from kvstream.testbed.engine.streams import Streams
from kvstream.testbed.engine.threads import SWITCH_INTERVAL_S
from kvstream.testbed.host import machine
from kvstream.testbed.host.shared_memory import SharedMemory
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.frames import Frames
from kvstream.testbed.net.network_process import NetworkProcess
from kvstream.testbed.receiver.driver import fetch_session
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.testbed.store.store import Store

ROOT = Path(__file__).resolve().parents[1]
CHUNKS, CHUNK_BYTES, CONTEXT, SLOTS = 7, 14_650_000, "wire", 4
PADDING_BYTES = 8 << 20
READ_BYTES = 1 << 20
HOLD_S, RELEASE_S = 60e-6, 50e-6
SENDERS = set(sorted(os.sched_getaffinity(0))[1:][-1:])
"""Its processor; none where there is only one in all."""
PLAIN_SENDER = """
import socket, sys
size, chunks, sessions = map(int, sys.argv[1:])
server = socket.create_server(("127.0.0.1", 0))
print('{"port": %d}' % server.getsockname()[1], flush=True)
body = bytes(size)
for _ in range(sessions):
    connection, _ = server.accept()
    while connection.recv(1):
        for _ in range(chunks):
            connection.sendall(body)
"""


@dataclass(frozen=True)
class Sample:
    """One session."""

    wall_s: float
    receiver_s: float
    """CPU time of the thread that receives."""
    sender_s: float
    reads: int


class NoEngine:
    """An engine whose steps take no time; chunks arrive in the same buffers as on a CPU."""

    def __init__(self, shared: SharedMemory | None) -> None:
        self.slots = SLOTS
        self._buffers = ChunkBuffers(Streams(), shared)
        self._thread = ThreadPoolExecutor(1)

    def submit(self, step: Any, *arguments: Any) -> Future[Any]:
        return self._thread.submit(step, *arguments)

    def close(self) -> None:
        self._thread.shutdown()

    def forget(self) -> None:
        pass

    def add_profile(self, data: bytes) -> str:
        raise NotImplementedError

    def lacks_profile(self, manifest: Manifest) -> bool:
        return False

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        self._buffers.open(manifest, SLOTS)

    def take(self, chunk: int, level: Any, size: int) -> IncomingChunk:
        return self._buffers.take(chunk, level, size)

    def on_bytes(self, incoming: IncomingChunk, received: int) -> None:
        incoming.arrived(received)

    def recompute(self, chunk: int, data: memoryview) -> Step:
        raise NotImplementedError

    def decode(self, incoming: IncomingChunk) -> Step:
        now_s = time.monotonic()
        return Step(now_s, now_s)

    def prefill(self, prompt_ids: Any) -> Step:
        now_s = time.monotonic()
        return Step(now_s, now_s, token=0)


def store_context(path: Path) -> None:
    """Chunks that are never decoded."""
    store, data = Store(path), os.urandom(CHUNK_BYTES)
    chunks = tuple(ChunkInfo(100 * i, 100 * (i + 1), (CHUNK_BYTES,), 400) for i in range(CHUNKS))
    level, codec = LevelInfo("0", 0.1, 1.0), {"codec": "raw", "settings": {}}
    with store.draft(CONTEXT) as draft:
        for i in range(CHUNKS):
            draft.put_chunk(i, 0, data)
            draft.put_chunk(i, TEXT, bytes(400))
        draft.publish(Manifest(CONTEXT, "none", codec, None, KVShape(2, 2, 8, "bfloat16"), (level,), chunks))


@contextmanager
def process(*arguments: str) -> Iterator[tuple[int, int]]:
    """A child that says its port: (process id, port)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    if SENDERS:
        os.sched_setaffinity(child.pid, SENDERS)
    try:
        yield child.pid, json.loads(child.stdout.readline())["port"]
    finally:
        child.kill()
        child.communicate()


@contextmanager
def busy() -> Iterator[None]:
    """A thread that holds the interpreter lock every other moment."""
    over = threading.Event()

    def hold(count: int) -> None:
        for _ in range(count):
            pass

    def run() -> None:
        begin_s = time.perf_counter()
        hold(1_000_000)
        count = int(1_000_000 * HOLD_S / (time.perf_counter() - begin_s))
        while not over.is_set():
            hold(count)
            time.sleep(RELEASE_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        time.sleep(0.1)
        yield
    finally:
        over.set()
        thread.join()


def cpu_s(pid: int) -> float:
    """What all threads of a process have computed."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


class Meter:
    """From `begin` to `end`."""

    def __init__(self, sender: int, receiver: int | None = None) -> None:
        """The receiver is another process, or this thread."""
        self._sender, self._receiver, self.reads = sender, receiver, 0

    def begin(self) -> None:
        self.reads, self._sender_s = 0, cpu_s(self._sender)
        self._begin_s, self._receiver_s = time.monotonic(), self._spent_s()

    def end(self) -> Sample:
        receiver_s, end_s = self._spent_s() - self._receiver_s, time.monotonic()
        return Sample(end_s - self._begin_s, receiver_s, cpu_s(self._sender) - self._sender_s, self.reads)

    def _spent_s(self) -> float:
        return time.thread_time() if self._receiver is None else cpu_s(self._receiver)


def plain(sessions: int) -> list[Sample]:
    target = memoryview(bytearray(b"1") * (SLOTS * CHUNK_BYTES))
    found = []
    with process("-c", PLAIN_SENDER, str(CHUNK_BYTES), str(CHUNKS), str(sessions)) as (pid, port):
        for _ in range(sessions):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                for _ in range(2):  # the first opens the window
                    meter, left, at = Meter(pid), CHUNKS * CHUNK_BYTES, 0
                    meter.begin()
                    connection.sendall(b"1")
                    while left:
                        size = connection.recv_into(target[at : at + READ_BYTES])
                        left, at, meter.reads = left - size, (at + size) % len(target), meter.reads + 1
                    sample = meter.end()
                found.append(sample)
    return found


def stream(sessions: int, folder: Path, network: NetworkProcess | None = None) -> list[Sample]:
    engine = NoEngine(network and network.memory)
    costs = Costs(((1e-4,),) * CHUNKS, None, 1e-4)
    read = Frames.buffer_updated

    async def one(url: str, pid: int) -> Sample:
        meter = Meter(pid, network and network.pid)

        def counted(self: Frames, nbytes: int) -> None:
            meter.reads += 1
            read(self, nbytes)

        def on_first_byte(chunk: int) -> None:
            if chunk == 0:
                meter.begin()

        Frames.buffer_updated = counted  # type: ignore[method-assign]
        async with Client(url) as client:
            await fetch_session(
                client, CONTEXT, Fixed(level=0), SessionSettings(60.0), engine=engine, costs=costs, prompt_ids=[0],
                padding_bytes=PADDING_BYTES, on_first_byte=on_first_byte, network=network,
            )  # fmt: skip
            return meter.end()

    try:
        with process("-m", "kvstream.testbed.net.sender", "--store", str(folder), "--port", "0") as (pid, port):
            return [asyncio.run(one(f"http://127.0.0.1:{port}", pid)) for _ in range(sessions)]
    finally:
        Frames.buffer_updated = read  # type: ignore[method-assign]


def row(arm: str, samples: list[Sample], floor: dict[str, Any] | None) -> dict[str, Any]:
    """Medians, without the first session."""
    samples, total = samples[1:], CHUNKS * CHUNK_BYTES
    middle = {key: statistics.median(getattr(sample, key) for sample in samples) for key in Sample.__annotations__}
    found: dict[str, Any] = {
        "arm": arm,
        "gbit_s": 8e-9 * total / middle["wall_s"],
        "receiver_s_per_gib": middle["receiver_s"] / total * 2**30,
        "sender_s_per_gib": middle["sender_s"] / total * 2**30,
        "kib_per_read": total / middle["reads"] / 1024 if middle["reads"] else None,
    }
    for key in ("gbit_s", "receiver_s_per_gib", "sender_s_per_gib"):
        found[f"{key}_of_plain"] = 1.0 if floor is None else found[key] / floor[key]
    print(
        f"{arm:<12} {found['gbit_s']:6.1f} Gbit/s ({found['gbit_s_of_plain']:.2f})   CPU s/GiB: receiver "
        f"{found['receiver_s_per_gib']:.3f} ({found['receiver_s_per_gib_of_plain']:.2f}), sender "
        f"{found['sender_s_per_gib']:.3f} ({found['sender_s_per_gib_of_plain']:.2f})"
        + (f"   {found['kib_per_read']:5.0f} KiB a read" if found["kib_per_read"] else "")
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=21)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    where = machine.describe()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    os.sched_setaffinity(0, os.sched_getaffinity(0) - SENDERS)
    rows = []
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        store_context(Path(name))
        for beside, suffix in ((nullcontext, ""), (busy, ", busy")):
            with beside():
                floor = row("plain" + suffix, plain(options.sessions), None)
                rows += [floor, row("stream" + suffix, stream(options.sessions, Path(name)), floor)]
                with closing(NetworkProcess()) as network:
                    rows.append(row("process" + suffix, stream(options.sessions, Path(name), network), floor))
    if options.out:
        body = {"command": "python " + " ".join(sys.argv), "machine": where, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
