"""Too slow to be a link: a peer that sends a byte now and then is never silent and never done."""

from __future__ import annotations

LEAST_BYTES_PER_S = 500.0


class Pace:
    """Bytes of one connection while something is expected of it; asks for LEAST_BYTES_PER_S over each `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._start_s = 0.0
        self._start_bytes = 0

    def restart(self, now_s: float, received: int) -> None:
        """Nothing was expected until now."""
        self._start_s, self._start_bytes = now_s, received

    def is_too_slow(self, now_s: float, received: int) -> bool:
        """Whether the window that ends now brought too little. A window that is not over never does."""
        elapsed_s = now_s - self._start_s
        if elapsed_s < self._window_s:
            return False
        slow = received - self._start_bytes < LEAST_BYTES_PER_S * elapsed_s
        self.restart(now_s, received)
        return slow
