"""A few seconds of the fuzzer, with a seed: `python -m tests.codec.fuzz` runs it for longer."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from kvstream.codec import container
from tests.codec.fuzz import CODECS, chunk_of, one_input, random_input


@pytest.mark.parametrize("seed", range(8))
def test_no_finding(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        one_input(random_input(draw))


def test_what_is_harmed_has_every_section() -> None:
    """Of kvstream; and one without the transform."""
    chunks = [container.parse(chunk_of("kvstream", level)) for level in range(6)]
    for tag in ("kind", "apar", "escs", "fine", "coef"):
        assert any(len(chunk.section(tag)) for chunk in chunks), tag
    assert "bits" in container.parse(chunk_of("kvstream-8", 0)).sections


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_absurd_shapes_are_refused_before_allocation() -> None:
    """2,400 shapes per codec, up to 2^32 - 1 in every dimension, in a process that may allocate another 64 MB."""
    command = [sys.executable, "-m", "tests.codec.fuzz", "--absurd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(CODECS) * (7**4 - 1)
