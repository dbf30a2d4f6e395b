"""A moment of the fuzzer for each parser, with a seed: `python -m tests.testbed.fuzz` runs it for longer."""

from __future__ import annotations

import random

import pytest

from tests.testbed.fuzz import TARGETS, mutated, one_input

INPUTS = 300


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_typed_errors(target: str) -> None:
    draw = random.Random(target)
    for seed in TARGETS[target][0]:
        one_input(target, seed)
    for _ in range(INPUTS):
        one_input(target, mutated(draw, TARGETS[target][0]))
