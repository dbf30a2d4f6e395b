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
@pytest.mark.parametrize("name", registry.names())
def test_decoding_holds_little_beside_its_output_and_encoding_little_beside_its_input(name: str) -> None:
    # Freed memory is to go back at once, or the next allocation would come out of it unseen.
    strict = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.codec.memory_probe", name]
    done = subprocess.run(
        command, env={**os.environ, **strict}, capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)[name]
    assert 1.0 <= found["decode"] <= 1.15
    assert 1.0 <= found["encode"] <= 4.0
