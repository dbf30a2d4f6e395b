"""Fuzz every parser of bytes from outside but the codecs' (those are in tests/codec/fuzz.py).

    python -m tests.testbed.fuzz [SECONDS] [TARGET ...]

A target may raise its typed errors, each in one line of bounded length, and nothing else; it must come back within
SLOW_S of processor time, whatever else runs beside it. Inputs are mutations of valid ones: bits, tokens of the formats,
cuts, splices, repetitions and nesting.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config import experiment, specs
from kvstream.testbed.config.build import codec_spec, make_link, make_policy
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_toml
from kvstream.testbed.lab import leaderboard
from kvstream.testbed.net import messages
from kvstream.testbed.results.folder import Run
from kvstream.testbed.results.folder import read_cells as cells_of
from kvstream.testbed.store.kv_file import read_kv_file
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.workloads.contexts import Context
from kvstream.traces.errors import TraceError
from kvstream.traces.formats import loads
from kvstream.traces.resolve import open_trace

TYPED = (SpecError, TraceError, CodecError, PolicyError)
SLOW_S = 5.0
LONGEST_MESSAGE = 2000
MANIFEST = json.dumps(
    {
        "format": 1, "context": "a", "model": "m", "codec": {"codec": "raw", "settings": {}, "profile_sha256": None},
        "profile": None, "kv": {"layers": 2, "heads": 2, "head_dim": 8, "dtype": "float32"},
        "levels": [{"name": "x", "distortion": 0.1, "bits_per_element": 2.0}], "chunks": [[0, 64, 64, [100]]],
    }
)  # fmt: skip
EXPERIMENT = """
name = "x"
contexts = ["docs"]
traces = ["constant,rate=10Mbps", "lte-like,seed=3"]
deadlines_s = [0.5, 1.0]
[[schemes]]
policy = "cachegen"
codec = "kvstream"
"""
RESULT = json.dumps(
    {"name": "me", "score": 1.0, "sessions": 10, "practice": False, "violations": 0.1, "gain": 1.0, "gain_low": None,
     "gain_high": None}
)  # fmt: skip
CONTEXT = json.dumps({"name": "x", "text": "line a: <12345>", "questions": [["line a: <", "12345"]]})
TRACES = (
    b"duration_s,rate_bps\n1,10000000\n0.5,2e6\n",
    b"0.0 1.5\n1.0 2.5\n2.0 0.5\n",
    b"1\n2\n2\n4\n10\n",
    b'[{"duration_ms": 1000, "bandwidth_kbps": 900, "latency_ms": 20}]',
    b"1289406399 25 99200 3000\n1289406401 26 120000 2000\n",
)
TOKENS = [
    b"0", b"-1", b"1e308", b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"' * 50, b"\n",
    b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b",", b"=", b":", b" ", b"\t", b"null", b"true", b"#", b"..", b"/",
    b"Mbps", b"ms", b"\x1b[2J", "é☃\u202e".encode(), b"1e-320", b"0x10", b"--", b"[[", b"]]", b"'''",
]  # fmt: skip


def in_file(data: bytes, read: Callable[[Path], object], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(data)
        read(file)


def text_of(data: bytes) -> str:
    return data.decode(errors="replace")


def spec(data: bytes) -> None:
    text = text_of(data)
    specs.parse(text)
    # only names that are none of ours may be looked up as files
    for read in (codec_spec, make_link):
        with suppress(*TYPED):
            read(text)
    make_policy(text)


def run_manifest(data: bytes) -> None:
    in_file(data, lambda file: Run(file.parent).manifest, "manifest.json")


TARGETS: dict[str, tuple[tuple[bytes, ...], Callable[[bytes], object]]] = {
    "traces": (TRACES, lambda data: loads(data, "fuzz")),
    "trace specs": (
        (b"constant,rate=10Mbps", b"uniform,low=1Mbps,high=9Mbps,hold=0.1s,seed=7", b"lte-like,seed=3", b"step,rate=1"),
        lambda data: open_trace(text_of(data)),
    ),
    "specs": ((b"kvstream,target=0.5", b"delay=20ms,queue=50ms", b"cachegen,coder=ac"), spec),
    "experiments": (
        (EXPERIMENT.encode(),),
        lambda data: experiment.from_dict(parse_toml(data, "fuzz") | {"name": "x"}),
    ),
    "contexts": ((CONTEXT.encode(),), lambda data: Context.from_json(text_of(data))),
    "manifests": ((MANIFEST.encode(),), Manifest.from_bytes),
    "wire": (
        (
            b'{"req": 1, "get": "chunk", "chunk": 3, "level": 1, "offset": 0}',
            b'{"cancel": 2}',
            b'{"req": 2, "bytes": 9}',
        ),
        lambda data: (messages.parse_request(text_of(data)), messages.parse_answer(text_of(data))),
    ),
    "cells": (
        (b'{"row": {}, "chunks": [], "link": []}', b'{"cells": []}'),
        lambda data: in_file(data, cells_of, "cell.json"),
    ),
    "run manifests": ((b'{"experiment": {"name": "x"}, "backend": "simulator", "schemes": []}',), run_manifest),
    "profiles": ((Profile({}, {"codec": "cachegen"}).to_bytes(),), Profile.from_bytes),
    "cache files": (
        (save({"kv": np.zeros((1, 2, 3, 1, 2), np.float16), "token_ids": np.arange(3)}, {"model": "ab" * 32}),),
        lambda data: in_file(data, read_kv_file, "kv.safetensors"),
    ),
    "leaderboard": (
        (RESULT.encode(),),
        lambda data: in_file(data, lambda file: leaderboard.text(leaderboard.board([file])), "result.json"),
    ),
}


def mutated(draw: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """A valid input with one to six changes."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0:
                data[at:at] = draw.choice(TOKENS)
            case 1:
                stop = min(len(data), at + draw.randrange(1, 12))
                data[at:stop] = draw.choice(TOKENS)
            case 2 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 3:
                del data[at : at + draw.randrange(1, 30)]
            case 4:
                other = draw.choice(seeds)
                data[at:] = other[draw.randrange(len(other) + 1) :]
            case 5:
                piece = bytes(data[at : at + draw.randrange(1, 40)])
                data[at:at] = piece * draw.choice([1, 2, 50, 400])
            case _:
                data[at:at] = draw.randbytes(draw.randrange(8))
        if len(data) > 1 << 20:
            del data[1 << 20 :]
    return bytes(data)


def one_input(target: str, data: bytes) -> None:
    """Raises AssertionError for a finding."""
    begin_s = time.process_time()
    try:
        TARGETS[target][1](data)
    except TYPED as error:
        message = str(error)
        assert len(message) <= LONGEST_MESSAGE, f"{target}: a message of {len(message)} characters for {data[:200]!r}"
        assert "\n" not in message.strip(), f"{target}: more than a line: {message!r} for {data[:200]!r}"
    except BaseException as error:
        raise AssertionError(f"{target}: {type(error).__name__}: {error} for {data[:400]!r}") from error
    took_s = time.process_time() - begin_s
    assert took_s < SLOW_S, f"{target}: {took_s:.1f} s for {data[:200]!r}"


def fuzz(seconds: float, targets: list[str], seed: int = 0) -> dict[str, int]:
    """Inputs tried for each target."""
    tried = {}
    for target in targets:
        draw, end_s, count = random.Random(f"{seed}/{target}"), time.monotonic() + seconds, 0
        while time.monotonic() < end_s:
            one_input(target, mutated(draw, TARGETS[target][0]))
            count += 1
        tried[target] = count
    return tried


if __name__ == "__main__":
    chosen = sys.argv[2:] or list(TARGETS)
    for name, count in fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, chosen, seed=time.time_ns()).items():
        print(f"{name}: {count} inputs, no finding")
