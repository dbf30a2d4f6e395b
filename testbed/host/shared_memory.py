"""Memory that a process has in common with its children."""

from __future__ import annotations

import ctypes
import mmap
import os


class SharedMemory:
    """Memory behind a file descriptor (memfd_create(2)), which a child inherits and gives as `fd`."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("kvstream") if fd is None else fd
        self._map: mmap.mmap | None = None
        self._address = 0

    def __len__(self) -> int:
        return 0 if self._map is None else len(self._map)

    def view(self, nbytes: int) -> memoryview:
        """All of it, `nbytes` or more, touched. Where it grows, earlier views stay valid and show the same bytes."""
        if nbytes > len(self):
            size = max(nbytes, os.fstat(self.fd).st_size)
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._address = _address(self._map)
        return memoryview(b"") if self._map is None else memoryview(self._map)

    def place_of(self, part: memoryview) -> int:
        """Where in the memory `part` of its present view begins. Raises ValueError for other memory."""
        place = _address(part) - self._address
        if not 0 <= place <= len(self) - len(part):
            raise ValueError("the bytes are not in the shared memory")
        return place


def _address(buffer: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
