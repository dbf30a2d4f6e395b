"""What faults and attacks cost a session: one row each, over loopback.

    python benchmarks/faults.py [--only TEXT] [--repeat N] [--out FILE.json]

A sender in a process of its own, a receiver here, and between them a relay of 40 Mbit/s that stops, cuts, trickles or
changes bytes when two fifths of a context have passed (8 chunks of 500 kB). `faults`: how sessions end and how long
they take, against undisturbed ones in the same run; every chunk that a finished session holds is compared with what was
stored, so `wrong` counts bytes that nobody noticed. `attacks`: a good client's session, without the relay, beside
strangers that send bombs, endless headers, idle connections and streams, or hostile manifests, and what the sender's
memory, descriptors and log come to. `load`: 1 to 256 receivers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.wire import NoEngine  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.policies.api import TEXT  # noqa: E402
from kvstream.policies.fixed import Fixed  # noqa: E402
from kvstream.testbed.engine.api import Step  # noqa: E402
from kvstream.testbed.engine.buffers import IncomingChunk  # noqa: E402
from kvstream.testbed.errors import SpecError  # noqa: E402
from kvstream.testbed.host import machine  # noqa: E402
from kvstream.testbed.net.client import Client  # noqa: E402
from kvstream.testbed.receiver.driver import Fetched, fetch_session  # noqa: E402
from kvstream.testbed.session.costs import Costs  # noqa: E402
from kvstream.testbed.session.record import SessionFailed  # noqa: E402
from kvstream.testbed.session.settings import SessionSettings  # noqa: E402
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest  # noqa: E402
from kvstream.testbed.store.store import Store  # noqa: E402
from tests.testbed.link import Link  # noqa: E402

CHUNKS, CHUNK_BYTES, CONTEXT = 8, 500_000, "faults"
RATE_BPS = 40e6
FAULT_AT_BYTES = CHUNKS * CHUNK_BYTES * 2 // 5
LOADS = (1, 16, 64, 256, 300)
BOMB = zlib.compress(b"[" * (1 << 28), 9)


class Sender:
    """A sender's process, which may be killed and started again on its port."""

    def __init__(self, store: Path, *arguments: str) -> None:
        self._store, self._arguments, self.port = store, arguments, 0
        self.log = store.parent / "sender.log"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(self._store)]
        with self.log.open("a") as log:
            self._child = subprocess.Popen(
                [*command, "--port", str(self.port), *self._arguments], stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        assert self._child.stdout is not None
        self.port = json.loads(self._child.stdout.readline())["port"]

    def kill(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.communicate()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory_mb(self, key: str = "VmRSS") -> float:
        return int(Path(f"/proc/{self._child.pid}/status").read_text().split(f"{key}:")[1].split()[0]) / 1e3

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._child.pid}/fd"))


class Checked(NoEngine):
    """Chunks are not decoded but hashed: what a codec's checksums find, this finds."""

    def __init__(self, hashes: Sequence[str]) -> None:
        super().__init__()
        self._hashes = hashes
        self.held: dict[int, str] = {}

    def decode(self, incoming: IncomingChunk) -> Step:
        digest = hashlib.sha256(incoming.view).hexdigest()
        if digest != self._hashes[incoming.chunk]:
            raise CodecError(f"chunk {incoming.chunk} is damaged")
        self.held[incoming.chunk] = digest
        return super().decode(incoming)


@dataclass
class Ended:
    """How one session ended."""

    seconds: float
    why: str = ""
    reconnects: int = 0
    wasted_bytes: int = 0
    wrong: int = 0
    first_s: float = field(default=float("nan"))


def store_context(path: Path) -> list[str]:
    """Chunks of random bytes; their hashes."""
    hashes = []
    with Store(path).draft(CONTEXT) as draft:
        for chunk in range(CHUNKS):
            hashes.append(draft.put_chunk(chunk, 0, os.urandom(CHUNK_BYTES)))
            draft.put_chunk(chunk, TEXT, bytes(400))
        chunks = tuple(ChunkInfo(100 * i, 100 * (i + 1), (CHUNK_BYTES,), 400) for i in range(CHUNKS))
        level, codec = LevelInfo("0", 0.1, 1.0), {"codec": "raw", "settings": {}}
        draft.publish(Manifest(CONTEXT, "none", codec, None, KVShape(2, 2, 8, "bfloat16"), (level,), chunks))
    return hashes


async def session(client: Client, hashes: Sequence[str]) -> Ended:
    """One session of the whole context."""
    engine, first = Checked(hashes), [float("nan")]
    begin_s = time.monotonic()

    def on_first_byte(chunk: int) -> None:
        if chunk == 0:
            first[0] = time.monotonic() - begin_s

    try:
        fetched: Fetched = await fetch_session(
            client, CONTEXT, Fixed(level=0), SessionSettings(120.0), engine=engine,  # type: ignore[arg-type]
            costs=Costs(((1e-4,),) * CHUNKS, None, 1e-4), prompt_ids=[0], on_first_byte=on_first_byte,
        )  # fmt: skip
    except (SessionFailed, OSError, aiohttp.ClientError) as error:
        return Ended(time.monotonic() - begin_s, why=str(error) or type(error).__name__)
    finally:
        engine.close()
    wrong = sum(engine.held.get(chunk) != digest for chunk, digest in enumerate(hashes))
    return Ended(
        time.monotonic() - begin_s, "", fetched.reconnects, fetched.record.wasted_bytes, wrong * CHUNK_BYTES, first[0]
    )


# --- faults

Fault = Callable[[Link, Sender], Awaitable[None]]


def killed(back_s: float | None) -> Fault:
    async def fault(link: Link, sender: Sender) -> None:
        await asyncio.to_thread(sender.kill)
        if back_s is not None:
            await asyncio.sleep(back_s)
            await asyncio.to_thread(sender.start)

    return fault


def stopped(seconds: float | None) -> Fault:
    async def fault(link: Link, sender: Sender) -> None:
        link.rate_bps = 0
        if seconds is not None:
            await asyncio.sleep(seconds)
            link.rate_bps = RATE_BPS

    return fault


async def reset(link: Link, sender: Sender) -> None:
    link.cut()


async def trickle(link: Link, sender: Sender) -> None:
    link.rate_bps, link.piece_bytes = 8.0, 1


def changed(change: Callable[[bytes], bytes], times: int = 1) -> Fault:
    async def fault(link: Link, sender: Sender) -> None:
        left = times

        def once(data: bytes) -> bytes:
            nonlocal left
            left -= 1
            return change(data) if left >= 0 else data

        link.change = once

    return fault


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


FAULTS: dict[str, Fault | None] = {
    "none": None,
    **{f"sender killed, back after {back_s:g} s": killed(back_s) for back_s in (0.2, 1.0, 3.0, 8.0)},
    "sender killed, never back": killed(None),
    "connection reset": reset,
    **{f"outage of {seconds:g} s": stopped(seconds) for seconds in (0.5, 2.0, 5.0)},
    "stall for ever": stopped(None),
    "trickle of 1 byte/s": trickle,
    "a bit flipped": changed(flipped),
    "2 kB lost": changed(lambda data: b""),
    "2 kB doubled": changed(lambda data: data + data),
    "all bytes flipped from then on": changed(flipped, times=1 << 40),
}


async def with_fault(fault: Fault | None, sender: Sender, hashes: Sequence[str]) -> Ended:
    async with Link(sender.port, RATE_BPS) as link, Client(link.url) as client:
        task = asyncio.create_task(session(client, hashes))
        acting: asyncio.Task[None] | None = None
        if fault is not None:
            await link.carried(FAULT_AT_BYTES)
            acting = asyncio.ensure_future(fault(link, sender))  # type: ignore[arg-type]
        ended = await task
        if acting is not None:
            await acting
        return ended


def fault_rows(folder: Path, hashes: Sequence[str], only: str, repeat: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, fault in FAULTS.items():
        if only not in name and name != "none":
            continue
        ends = []
        for _ in range(repeat):
            sender = Sender(folder)
            ends.append(asyncio.run(with_fault(fault, sender, hashes)))
            sender.kill()
        whole = [end for end in ends if not end.why]
        rows.append(
            {
                "fault": name,
                "sessions": repeat,
                "finished": len(whole),
                "seconds": statistics.median(end.seconds for end in ends),
                "longest_s": max(end.seconds for end in ends),
                "reconnects": max(end.reconnects for end in ends),
                "wrong_bytes": sum(end.wrong for end in whole),
                "why": next((end.why for end in ends if end.why), ""),
            }
        )
        one = rows[-1]
        print(
            f"{name:34} {one['finished']}/{repeat} finished, {one['seconds']:6.2f} s, "
            f"{one['reconnects']} reconnections, {one['wrong_bytes']} wrong bytes  {one['why']}",
            flush=True,
        )
    return rows


# --- attacks


@asynccontextmanager
async def strangers(count: int, act: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(act(i)) for i in range(count)]
    await asyncio.sleep(0.5)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def attacks(port: int) -> dict[str, tuple[int, Callable[[int], Awaitable[None]]]]:
    async def raw(head: bytes, body: bytes = b"", every_s: float | None = None) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head)
                writer.write(body)
                await writer.drain()
                while every_s is not None:
                    writer.write(b"X")
                    await writer.drain()
                    await asyncio.sleep(every_s)
                await reader.read(1000)
                writer.close()
            await asyncio.sleep(0.05)

    async def bomb(_: int) -> None:
        headers = f"Host: x\r\nContent-Encoding: deflate\r\nContent-Length: {len(BOMB)}"
        await raw(f"PUT /v1/contexts/x HTTP/1.1\r\n{headers}\r\n\r\n".encode(), BOMB)

    async def headers(_: int) -> None:
        await raw(b"GET /healthz HTTP/1.1\r\n", every_s=0.5)

    async def idle(_: int) -> None:
        reader, _writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()

    async def streams(_: int) -> None:
        async with (
            aiohttp.ClientSession() as one,
            one.ws_connect(f"http://127.0.0.1:{port}/v1/contexts/{CONTEXT}/stream") as socket_,
        ):
            await socket_.receive()

    async def manifests(_: int) -> None:
        deep = b"[" * (4 << 20)
        await raw(f"PUT /v1/contexts/x HTTP/1.1\r\nHost: x\r\nContent-Length: {len(deep)}\r\n\r\n".encode(), deep)

    async def unasked(_: int) -> None:
        await raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n", bytes(1 << 22))

    async def nothing(_: int) -> None:
        await asyncio.sleep(1000)

    return {
        "nobody": (1, nothing),
        "bombs of 256 MiB, 4 clients": (4, bomb),
        "endless headers, 200 connections": (200, headers),
        "idle connections, 1000": (1000, idle),
        "abandoned streams, 300": (300, streams),
        "manifests of 4 MiB of '[', 4 clients": (4, manifests),
        "bodies that nobody asked for, 8 clients": (8, unasked),
    }


def attack_rows(folder: Path, hashes: Sequence[str], only: str, repeat: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    async def one(name: str, sender: Sender) -> list[Ended]:
        count, act = attacks(sender.port)[name]
        async with strangers(count, act), Client(sender.url) as client:
            return [await session(client, hashes) for _ in range(repeat)]

    for name in attacks(0):
        if only not in name and name != "nobody":
            continue
        sender = Sender(folder, "--writable")
        ends = asyncio.run(one(name, sender))
        rows.append(
            {
                "attack": name,
                "sessions": repeat,
                "finished": sum(not end.why for end in ends),
                "seconds": statistics.median(end.seconds for end in ends),
                "longest_s": max(end.seconds for end in ends),
                "wrong_bytes": sum(end.wrong for end in ends),
                "sender_peak_mb": sender.memory_mb("VmHWM"),
                "log_bytes": sender.log.stat().st_size,
                "why": next((end.why for end in ends if end.why), ""),
            }
        )
        sender.kill()
        got = rows[-1]
        print(
            f"{name:40} {got['finished']}/{repeat} finished, {got['seconds']:.3f} s (longest {got['longest_s']:.3f}), "
            f"sender {got['sender_peak_mb']:.0f} MB at most  {got['why']}",
            flush=True,
        )
    return rows


# --- load


def load_rows(folder: Path, hashes: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    sender = Sender(folder)

    async def together(count: int) -> list[Ended]:
        async def one() -> Ended:
            async with Client(sender.url) as client:
                return await session(client, hashes)

        return await asyncio.gather(*(one() for _ in range(count)))

    for count in LOADS:
        begin_s = time.monotonic()
        ends = asyncio.run(together(count))
        took_s = time.monotonic() - begin_s
        time.sleep(0.5)
        rows.append(
            {
                "receivers": count,
                "finished": sum(not end.why for end in ends),
                "mb_per_s": count * CHUNKS * CHUNK_BYTES / took_s / 1e6,
                **{
                    f"{what}_p{share}_s": float(np.nanpercentile(values, share))
                    for what, values in (("first", [e.first_s for e in ends]), ("all", [e.seconds for e in ends]))
                    for share in (50, 99)
                },
                "wrong_bytes": sum(end.wrong for end in ends),
                "sender_mb_after": sender.memory_mb(),
                "sender_descriptors_after": sender.descriptors(),
                "why": next((end.why for end in ends if end.why), ""),
            }
        )
        got = rows[-1]
        print(
            f"{count:4} receivers: {got['finished']} finished, {got['mb_per_s']:.0f} MB/s, all within "
            f"{got['all_p99_s']:.2f} s (p99), sender {got['sender_mb_after']:.0f} MB and "
            f"{got['sender_descriptors_after']} descriptors afterwards  {got['why']}",
            flush=True,
        )
    sender.kill()
    return rows


def full_disk(folder: Path) -> dict[str, Any]:
    """An upload to a sender whose disk is too small, in a mount namespace of its own."""
    place = folder.parent / "small"
    place.mkdir()
    script = (
        f"mount -t tmpfs -o size=2m none {place} && exec {sys.executable} -m kvstream.testbed.net.sender"
        f" --store {place}/store --port 0 --writable"
    )
    child = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    try:
        port = json.loads(child.stdout.readline())["port"]

        async def upload() -> str:
            async with Client(f"http://127.0.0.1:{port}") as client:
                try:
                    await client.store_kv(Store(folder), CONTEXT)
                except SpecError as error:
                    return str(error)
                return "stored"

        said = asyncio.run(upload())
        with socket.create_connection(("127.0.0.1", port)):
            alive = child.poll() is None
    finally:
        child.kill()
        child.communicate()
    print(f"an upload to a full disk: {said}; the sender {'goes on' if alive else 'died'}")
    return {"fault": "upload to a full disk", "why": said, "sender_alive": alive}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this, and the undisturbed ones")
    parser.add_argument("--repeat", type=int, default=3, help="sessions a row (default: 3)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        hashes = store_context(store)
        result = {
            "command": f"python benchmarks/faults.py --repeat {args.repeat}",
            "machine": machine.describe(),
            "faults": fault_rows(store, hashes, args.only, args.repeat),
            "attacks": attack_rows(store, hashes, args.only, args.repeat),
            "load": [] if args.only else load_rows(store, hashes),
            "full_disk": {} if args.only else full_disk(store),
        }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
