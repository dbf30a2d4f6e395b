"""Memory in common: what one process writes the other reads, also after it has grown."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvstream.testbed.host.shared_memory import SharedMemory

CHILD = """
import sys
from kvstream.testbed.host.shared_memory import SharedMemory
fd, nbytes, at, value = map(int, sys.argv[1:])
SharedMemory(fd).view(nbytes)[at] = value
"""


def write_elsewhere(memory: SharedMemory, at: int, value: int) -> None:
    command = [sys.executable, "-c", CHILD, *map(str, (memory.fd, len(memory), at, value))]
    subprocess.run(command, check=True, pass_fds=(memory.fd,))


def test_a_child_sees_and_writes_the_same_bytes() -> None:
    memory = SharedMemory()
    first = memory.view(10_000)
    write_elsewhere(memory, 9_999, 7)
    assert first[9_999] == 7
    assert not any(first[:9_999])
    larger = memory.view(1_000_000)
    write_elsewhere(memory, 500_000, 8)
    assert (larger[9_999], larger[500_000]) == (7, 8)
    larger[1] = 9
    assert first[1] == 9, "views from before it grew are of the same memory"
    assert len(memory.view(5)) == len(memory) == 1_000_000


def test_where_a_part_lies() -> None:
    memory = SharedMemory()
    view = memory.view(4096)
    assert memory.place_of(view[100:200]) == 100
    assert memory.place_of(view[:]) == 0
    for other in (memoryview(bytearray(10)), memoryview(bytearray(10_000))):
        with pytest.raises(ValueError, match="not in the shared memory"):
            memory.place_of(other)
