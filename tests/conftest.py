"""For all tests: no time limits on examples, because a busy machine would fail tests that are right."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("kvstream", deadline=None)
settings.load_profile("kvstream")
