"""Values out of files, held against annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kvstream.testbed.config import type_check
from kvstream.testbed.errors import SpecError


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        (float("nan"), float, False),
        (1.0, int, False),
        ("a", str, True),
        (["a"], tuple[str, ...], True),
        (["a", 1], tuple[str, ...], False),
        ("a", tuple[str, ...], False),
        ({"a": 1}, Mapping[str, float], True),
        ({"a": "b"}, Mapping[str, float], False),
        ([], Mapping[str, float], False),
        (None, float | None, True),
        ("x", float | None, False),
        ([object()], list, True),
        ({}, list, False),
    ],
)
def test_what_fits(value: object, hint: Any, good: bool) -> None:
    assert type_check.fits(value, hint) == good


def test_the_name_the_value_and_what_to_give_are_told() -> None:
    hints = {"rates": tuple[float, ...], "limits": Mapping[str, float], "any": list, "on": bool, "x": int | None}
    for values, says in (
        ({"rates": "5" * 100}, r"^rates is '5+\.\.\.; give a list of numbers$"),
        ({"limits": 3}, "^limits is 3; give a table of numbers$"),
        ({"any": 3}, "^any is 3; give a list$"),
        ({"on": 1}, "^on is 1; give true or false$"),
        ({"x": "y"}, "^x is 'y'; give a whole number or nothing$"),
    ):
        with pytest.raises(SpecError, match=says):
            type_check.check(values, hints)
    type_check.check({"another": 3, "on": True}, hints)
