"""What coding holds in memory, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codec import registry

CLEAR_REFS = Path("/proc/self/clear_refs")


@pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason="needs /proc/self/clear_refs, which only Linux has")
@pytest.mark.parametrize(
    ("shape", "threads", "names"),
    [
        ("deep", 16, [*registry.CODECS]),  # each thread holds buffers of its own
        ("small", 2, [*registry.CODECS]),
    ],
)
def test_decoding_holds_little_beside_its_output_and_encoding_little_beside_its_input(
    shape: str, threads: int, names: list[str]
) -> None:
    # Freed memory is to go back at once, or the next allocation would come out of it unseen.
    strict = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.codec.memory_probe", shape, str(threads), *names]
    done = subprocess.run(
        command, env={**os.environ, **strict}, capture_output=True, text=True, check=True, timeout=240
    )
    found = json.loads(done.stdout)
    for name in names:
        assert 1.0 <= found[name]["decode"] <= (1.15 if shape == "deep" else 2.0), name
        assert 1.0 <= found[name]["encode"] <= 4.0, name
