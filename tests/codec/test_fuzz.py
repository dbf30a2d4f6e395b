"""A few seconds of the fuzzer, with a seed: `python -m tests.codec.fuzz` runs it for longer."""

from __future__ import annotations

import random

import pytest

from tests.codec.fuzz import one_input, random_input


@pytest.mark.parametrize("seed", range(8))
def test_no_finding(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        one_input(random_input(draw))
