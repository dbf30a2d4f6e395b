"""Contexts of up to 128K tokens, stored, served and fetched here: seconds, bytes, requests, and the memory of each end.

    python benchmarks/long_context.py [--tokens N ...] [--json]

Synthetic caches of Mistral-7B's shape (32 layers, 8 heads of 128), every chunk of 1,024 tokens the same values at its
own position: timing and sizes only. A context is encoded with kvstream at six levels and stored by one process, served
by a second (`kvstream serve`) and fetched by a third, which decodes every chunk and hands its values on, as to a GPU: a
cache of 128K tokens itself is 17 GB. Printed is the peak of each process's resident memory during its step. Then what a
bucket is asked for (a real S3 server on loopback), as requests per chunk and level; and one session of up to a million
tokens in the simulator: seconds, a policy's longest choice, bytes of manifests. All of it is in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvstream.policies.api import Choice, Observation
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.host import machine
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.opening import open_store
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads import synthetic
from kvstream.traces.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
WORKLOAD, CODEC, CHUNK_TOKENS, LEVEL = "mistral-7b,compute=h200", "kvstream", 1024, 2
TOKENS = (16_384, 131_072)
SIMULATED = ((131_072, 1_500), (1_000_000, 1_500), (131_072, 256), (1_000_000, 256))
POLICIES = ("cachegen", "kvstream")
RATE_BPS, DEADLINE_S = 10e9, 5.0
PATIENCE_S = 60.0
"""The deadline of a fetch, which is given up after ten times as long."""


# --- processes of their own, for their memory


def peak_bytes(pid: int | str = "self") -> int:
    """The most memory that a process has had resident, since it began or `reset_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def store(folder: Path, tokens: list[int]) -> list[dict[str, Any]]:
    """A store for each context, below `folder`. The profile is fitted once, before anything is measured."""
    from kvstream.testbed.encoding import synthetic_store

    workload = synthetic.parse(WORKLOAD)
    codec = synthetic_store.fitted(CODEC, workload.kv)
    encoded: dict[int, list[bytes]] = {}
    synthetic_store.store_context(
        Store(folder / "warm"), "long", workload, str(CHUNK_TOKENS), codec, CHUNK_TOKENS, encoded
    )
    rows = []
    for count in tokens:
        here = Store(folder / str(count))
        reset_peak()
        before, begun_s = peak_bytes(), time.perf_counter()
        synthetic_store.store_context(here, "long", workload, str(count), codec, CHUNK_TOKENS, encoded)
        seconds = time.perf_counter() - begun_s
        manifest = here.manifest("long")
        hashes = here.path / "contexts" / "long" / "hashes.json"
        rows.append(
            {
                "tokens": count,
                "chunks": len(manifest.chunks),
                "levels": len(manifest.levels),
                "store_s": seconds,
                "store_peak_bytes": peak_bytes(),
                "store_before_bytes": before,
                "bytes": sum(sum(chunk.sizes_bytes) for chunk in manifest.chunks),
                "manifest_bytes": len(manifest.wire),
                "hashes_bytes": hashes.stat().st_size,
                "profile_bytes": len(here.profile(str(manifest.profile))),
            }
        )
    return rows


def fetch(url: str) -> dict[str, Any]:
    """Fetch and decode the context `long` into a target that keeps nothing but sums; every chunk's must agree."""
    import torch

    import kvstream
    from kvstream.codec.targets import DTYPES, CacheTarget
    from kvstream.testbed.receiver.cache_engine import shape_of
    from kvstream.testbed.store.manifest import Manifest

    class Passing(CacheTarget):
        def __init__(self, manifest: Manifest) -> None:
            self.shape = shape_of(manifest)
            self.dtype, self.device = DTYPES[manifest.kv.dtype], torch.device("cpu")
            self.sums = np.zeros(len(manifest.chunks))
            self.tokens = np.zeros((manifest.kv.layers, 2), np.int64)

        def write(self, layer: int, kv: int, values: torch.Tensor, first: int = 0) -> None:
            self.sums[first // CHUNK_TOKENS] += float(values.float().abs().sum())
            self.tokens[layer, kv] += len(values)

    begun_s = time.perf_counter()
    got = kvstream.fetch(url, "long", f"fixed,level={LEVEL}", PATIENCE_S, into=Passing)
    assert isinstance(got.cache, Passing)
    measured = slice(0, 1)  # decoded once more before the session, for its costs
    sums, tokens = got.cache.sums, got.cache.tokens
    assert (tokens >= got.manifest.tokens).all(), tokens
    assert np.allclose(np.delete(sums, measured), sums[-1], rtol=1e-3), sums
    return {
        "fetch_s": time.perf_counter() - begun_s,
        "session_s": got.record.ttft_s,
        "fetched_bytes": got.record.bytes,
        "receiver_peak_bytes": peak_bytes(),
        "largest_chunk_bytes": max(chunk.sizes_bytes[LEVEL] for chunk in got.manifest.chunks),
    }


def part(name: str, *arguments: str, cache: Path) -> Any:
    """What a part prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", name, *arguments], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    return json.loads(done.stdout)


def serve_and_fetch(folder: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(folder), "--port", "0"]
    begun_s = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as sender:
        try:
            assert sender.stdout is not None
            port = json.loads(sender.stdout.readline())["port"]
            start_s = time.perf_counter() - begun_s
            row = part("fetch", f"http://127.0.0.1:{port}", cache=cache)
            return row | {"sender_peak_bytes": peak_bytes(sender.pid), "sender_start_s": start_s}
        finally:
            sender.terminate()


# --- a bucket's requests


def bucket_requests(chunks: int) -> dict[str, Any] | None:
    """Requests by verb of each step, for a context of so many chunks at two levels; None without the packages."""
    try:
        import s3fs
        from moto.server import ThreadedMotoServer
    except ImportError:
        return None
    asked: list[str] = []

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            asked.append(next(verb for verb in ("GET", "PUT", "HEAD", "POST", "DELETE") if f"{verb} /" in line))

    log = logging.getLogger("werkzeug")
    log.handlers, log.propagate = [Count()], False
    log.setLevel(logging.INFO)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir(f"bench{chunks}")
    steps: dict[str, Any] = {"chunks": chunks, "levels": 2}

    def step(name: str) -> None:
        steps[name] = dict(Counter(asked))
        asked.clear()

    step("begin")
    here = open_store(f"s3://bench{chunks}/x")
    step("open")
    fill(here, chunks)
    step("put")
    entry = here.entry("long")
    step("read the context")
    for index in range(chunks):
        here.read(entry, index, 0)
    step("session")
    here.contexts()
    step("list")
    here.remove("long")
    step("remove")
    del steps["begin"]
    server.stop()
    return steps


def fill(store: Any, chunks: int) -> None:
    from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest

    infos = tuple(ChunkInfo(i, i + 1, (16, 32), 4) for i in range(chunks))
    levels = (LevelInfo("a", 1.0, 1.0), LevelInfo("b", 0.5, 2.0))
    with store.draft("long") as draft:
        for index in range(chunks):
            draft.put_chunk(index, "text", bytes(4))
            draft.put_chunk(index, 0, bytes(16))
            draft.put_chunk(index, 1, bytes(32))
        draft.publish(Manifest("long", "made", {"codec": "raw"}, None, KVShape(1, 1, 1, "float16"), levels, infos))


# --- the simulator


class Timed:
    """A policy, and how long its longest choice took."""

    def __init__(self, policy: Any) -> None:
        self._policy, self.worst_s = policy, 0.0

    def choose(self, obs: Observation) -> Choice:
        begun_s = time.perf_counter()
        try:
            return self._policy.choose(obs)
        finally:
            self.worst_s = max(self.worst_s, time.perf_counter() - begun_s)


def simulated() -> list[dict[str, Any]]:
    workload, rows = synthetic.parse(WORKLOAD), []
    link = Trace("constant", np.array([1.0]), np.array([RATE_BPS]))
    for tokens, chunk_tokens in SIMULATED:
        manifest = workload.manifest(str(tokens), CODEC, chunk_tokens)
        costs = workload.costs(manifest)
        for name in POLICIES:
            policy, begun_s = Timed(make_policy(name)), time.perf_counter()
            record = simulate(manifest, policy, link, SessionSettings(DEADLINE_S), costs=costs)
            rows.append(
                {
                    "tokens": tokens,
                    "chunk_tokens": chunk_tokens,
                    "chunks": len(manifest.chunks),
                    "policy": name,
                    "simulate_s": time.perf_counter() - begun_s,
                    "longest_choice_s": policy.worst_s,
                    "ttft_s": record.ttft_s,
                    "bytes": record.bytes,
                    "lowest_bytes": sum(min(chunk.sizes_bytes) for chunk in manifest.chunks),
                    "highest_bytes": sum(max(chunk.sizes_bytes) for chunk in manifest.chunks),
                    "manifest_bytes": len(manifest.wire),
                    "peak_bytes": peak_bytes(),
                }
            )
    return rows


def show(found: dict[str, Any]) -> None:
    print("SYNTHETIC caches of Mistral-7B's shape; level", LEVEL, "is fetched")
    for row in found["real"]:
        print(
            f"{row['tokens']:8} tokens  {row['bytes'] / 1e9:5.2f} GB stored in {row['store_s']:5.1f} s, fetched "
            f"{row['fetched_bytes'] / 1e6:5.0f} MB in {row['fetch_s']:5.1f} s; peak MB: writer "
            f"{row['store_peak_bytes'] / 1e6:5.0f}, sender {row['sender_peak_bytes'] / 1e6:5.0f}, receiver "
            f"{row['receiver_peak_bytes'] / 1e6:5.0f}; manifest {row['manifest_bytes']}, hashes {row['hashes_bytes']} B"
        )
    print("bucket:", json.dumps(found["bucket"]))
    for row in found["simulated"]:
        print(
            f"{row['tokens']:8} tokens in {row['chunks']:5} chunks, {row['policy']:9} {row['simulate_s']:6.2f} s, "
            f"longest choice {1e3 * row['longest_choice_s']:5.1f} ms, TTFT {row['ttft_s']:.3f} s with "
            f"{row['bytes'] / 1e9:.2f} GB; "
            f"manifest {row['manifest_bytes']} B, peak {row['peak_bytes'] / 1e6:.0f} MB"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of the contexts that are stored")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.part:
        case ["store", folder, *tokens]:
            print(json.dumps(store(Path(folder), [int(one) for one in tokens])))
            return 0
        case ["fetch", url]:
            print(json.dumps(fetch(url)))
            return 0
        case ["simulate"]:
            print(json.dumps(simulated()))
            return 0
    with tempfile.TemporaryDirectory(prefix="kvstream-long-") as place:
        folder, cache = Path(place), Path(place) / "cache"
        rows = part("store", str(folder), *map(str, options.tokens), cache=cache)
        serve_and_fetch(folder / "warm", cache)  # the profile is there and kernels are compiled
        rows = [row | serve_and_fetch(folder / str(row["tokens"]), cache) for row in rows]
        found = {
            "label": "synthetic caches of Mistral-7B's shape, for timing and sizes only",
            "machine": machine.describe(),
            "workload": WORKLOAD,
            "codec": CODEC,
            "chunk_tokens": CHUNK_TOKENS,
            "level": LEVEL,
            "rate_bps": RATE_BPS,
            "deadline_s": DEADLINE_S,
            "real": rows,
            "bucket": bucket_requests(8),
            "bucket, twice the chunks": bucket_requests(16),
            "simulated": part("simulate", cache=cache),
        }
    print(json.dumps(found, indent=1)) if options.json else show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
