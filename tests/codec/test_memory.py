"""Memory that coding takes, as the kernel measures it in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstream.codec import registry

CLEAR_REFS = Path("/proc/self/clear_refs")
LAYER_BY_LAYER = [name for name in registry.CODECS if name != "kvtc"]
"""`kvtc` has, as published, one basis for all layers."""


@pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason="needs /proc/self/clear_refs, which only Linux has")
@pytest.mark.parametrize(
    ("shape", "threads", "names"),
    [
        ("deep", 16, LAYER_BY_LAYER),  # each thread holds its own buffers
        ("small", 2, LAYER_BY_LAYER),
    ],
)
def test_decoding_and_encoding_need_little_extra_memory(shape: str, threads: int, names: list[str]) -> None:
    # Freed memory returns to the system at once, or the next allocation would reuse it unseen.
    strict = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.codec.memory_probe", shape, str(threads), *names]
    done = subprocess.run(
        command, env={**os.environ, **strict}, capture_output=True, text=True, check=True, timeout=240
    )
    found = json.loads(done.stdout)
    for name in names:
        assert 1.0 <= found[name]["decode"] <= (1.15 if shape == "deep" else 2.0), name
        assert 1.0 <= found[name]["encode"] <= 4.0, name
