"""Property tests here judge results, never the time they take: machines that run tests are busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("traces", deadline=None)
settings.load_profile("traces")
