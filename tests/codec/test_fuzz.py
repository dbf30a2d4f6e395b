"""A few seconds of the fuzzer, with a seed: `python -m tests.codec.fuzz` runs it for longer."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.codec.fuzz import one_input, random_input


@pytest.mark.parametrize("seed", range(8))
def test_no_finding(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        one_input(random_input(draw))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_absurd_shapes_are_refused_before_memory_is_taken_for_them() -> None:
    """2,400 shapes a codec, up to 2^32 - 1 in every dimension, in a process that may take 64 MB more than it has."""
    command = [sys.executable, "-m", "tests.codec.fuzz", "--absurd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 7 * (7**4 - 1)
