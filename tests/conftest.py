"""For all tests: no time limits on examples, because a busy machine would fail tests that are right; and a codec that a
test takes from a file is known to that test only, in whatever order they run."""

from __future__ import annotations

import pytest
from hypothesis import settings

from kvstream.codec import registry

settings.register_profile("kvstream", deadline=None)
settings.load_profile("kvstream")


@pytest.fixture(autouse=True)
def _no_codec_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FROM_FILES", {})
