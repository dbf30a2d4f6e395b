"""Requests to a program that waits for other things too: lines of JSON on its standard input."""

from __future__ import annotations

import json
import os
from typing import Any


class Requests:
    """What has come so far. Read without a buffer of Python's, in which select() would not see a second line."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._rest = b""

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> list[Any] | None:
        """Every whole request that is there, perhaps none; None at the end of the input. Waits when nothing is."""
        data = os.read(self._descriptor, 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
