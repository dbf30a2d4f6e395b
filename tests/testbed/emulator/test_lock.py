"""One emulation at a time, whoever starts it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from kvstream.testbed.emulator import lock as locking
from kvstream.testbed.errors import MachineError


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "LOCK", tmp_path / "lock")
    return locking.LOCK


def test_the_lock_can_be_opened_by_other_users_whatever_the_umask(lock):
    before = os.umask(0o077)
    try:
        with locking.alone():
            assert lock.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_who_does_not_wait_is_told(lock):
    lock.touch()
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(locking.Taken, match="another emulation is running here"),
            locking.alone(wait=False),
        ):
            pass
    with locking.alone(wait=False), locking.alone(wait=False):
        pass  # networks of one process count as one


def test_the_turn_is_the_machines_wherever_temporary_files_go(tmp_path):
    code = "from kvstream.testbed.emulator import lock; print(lock.LOCK)"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for folder in (tmp_path, "/nowhere", "/tmp")
    }
    assert said == {f"{locking.LOCK}\n"}


def test_a_lock_that_is_a_link_is_not_followed(lock, tmp_path):
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="cannot be used as the lock of emulations"), locking.alone():
        pass
    assert not (tmp_path / "elsewhere").exists()
