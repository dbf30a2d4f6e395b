"""One emulation at a time, whoever starts it."""

from __future__ import annotations

import fcntl
import os

import pytest

from testbed.emulator import turn


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(turn, "LOCK", tmp_path / "lock")
    return turn.LOCK


def test_the_lock_can_be_opened_by_other_users_whatever_the_umask(lock):
    before = os.umask(0o077)
    try:
        with turn.alone():
            assert lock.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_who_does_not_wait_is_told(lock):
    lock.touch()
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(turn.Taken, match="another emulation is running here; try again"), turn.alone(wait=False):
            pass
    with turn.alone(wait=False), turn.alone(wait=False):
        pass  # networks of one process count as one
