"""Contexts from files: what cannot become a name is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.workloads.contexts import Context, find_contexts


@pytest.mark.parametrize("name", ["with blank", "a.b", "x" * 200, "", "../x", "-x", 3, None, "a\nb"])
def test_names_become_files_and_ids(name: object) -> None:
    content = json.dumps({"name": name, "text": "some text", "questions": []})
    with pytest.raises(SpecError, match=r"x.json: name .* must be 1 to 80 letters") as caught:
        Context.from_json(content, "x.json")
    assert len(str(caught.value)) < 200


def test_an_empty_text_is_no_context() -> None:
    with pytest.raises(SpecError, match="the text is empty"):
        Context.from_json(json.dumps({"name": "x", "text": "", "questions": []}))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"name": "x", "text": "text", "questions": []}).encode())
    assert find_contexts([str(file)])[0].name == "x"
