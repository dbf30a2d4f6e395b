"""The oldest and the newest transformers that work: `scripts/transformers.sh` runs sessions into their caches."""

from __future__ import annotations

import subprocess

import pytest

from tests.pages import ROOT

CANNOT_INSTALL = 4


@pytest.mark.parametrize("version", ["4.56.0", "5.24.0"])
def test_sessions_under_another_version(version: str) -> None:
    pytest.importorskip("torch", reason="needs torch, from the extra [run]")
    done = subprocess.run([ROOT / "scripts" / "transformers.sh", version], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_INSTALL:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout
    assert f"transformers {version}\n" in done.stdout
    assert " passed" in done.stdout
