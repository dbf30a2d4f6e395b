"""Manifests from strangers: refused in one line, however large, deep or wrong they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import MAX_MANIFEST_BYTES, Manifest
from tests.testbed.conftest import Stored


def body(stored: Stored) -> dict[str, Any]:
    return json.loads(json.dumps(stored.store.manifest(stored.context).to_json()))


def refusal(data: bytes) -> str:
    with pytest.raises(SpecError) as caught:
        Manifest.from_bytes(data)
    message = str(caught.value)
    assert len(message) < 400
    assert "\n" not in message
    return message


@pytest.mark.parametrize("number", ["1" * 401, "NaN", "Infinity", "1e308", "-1", '"' + "x" * 100_000 + '"', "9" * 5000])
@pytest.mark.parametrize("field", ["distortion", "bits_per_element"])
def test_numbers_that_are_none(stored: Stored, number: str, field: str) -> None:
    data = body(stored)
    data["levels"][0][field] = "@"
    refusal(json.dumps(data).replace('"@"', number).encode())


@pytest.mark.parametrize("deep", ["[" * 10_000, '{"a":' * 5000, "[" * 1000 + "]" * 1000])
def test_nesting(stored: Stored, deep: str) -> None:
    data = body(stored)
    data["codec"]["settings"] = "@"
    refusal(json.dumps(data).replace('"@"', deep).encode())
    refusal(deep.encode())


def test_size(stored: Stored) -> None:
    assert "bytes" in refusal(b" " * (MAX_MANIFEST_BYTES + 1))
    data = body(stored)
    data["codec"]["settings"] = {"x": "y" * 100_000}
    assert "larger than" in refusal(json.dumps(data).encode())
    data = body(stored)
    data["chunks"] = [[i, i + 1, 1, [1] * 20] for i in range(20_000)]
    data["levels"] = data["levels"] * 20
    assert "more than" in refusal(json.dumps(data, separators=(",", ":")).encode())


def test_names_cannot_write_to_a_terminal(stored: Stored) -> None:
    data = body(stored)
    data["model"] = "\x1b[2J"
    assert "printable" in refusal(json.dumps(data).encode())


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_any_value_in_any_field_is_taken_or_refused(stored: Stored, value: Any) -> None:
    for field in ("format", "context", "model", "codec", "profile", "kv", "levels", "chunks"):
        data = json.dumps(body(stored) | {field: value}).encode()
        try:
            manifest = Manifest.from_bytes(data)
        except SpecError:
            refusal(data)
        else:
            assert Manifest.from_bytes(manifest.wire) == manifest
