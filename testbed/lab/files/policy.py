"""My policy. This is the only file you hand in: at most 60 lines.

kvstream lab check             how it does on six links
kvstream lab explain cliff 7   what it saw before chunk 7, what it chose, what the oracle chooses
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    """Every session gets a new object: what you keep in `self` lasts for one session."""

    first: int = 0  # settings are dataclass fields; try: kvstream lab check policy.py:MyPolicy,first=3
    careful: float = 0.9

    def choose(self, obs: Observation) -> Choice:
        """Called once for every chunk. Level 0 is the smallest and worst, obs.n_levels - 1 the best.

        obs.now_s, obs.left_s          time since the request, time to the deadline (seconds)
        obs.chunk, obs.n_chunks        the chunk to choose for; the number of chunks
        obs.sizes_bytes[i][level]      bytes of the i-th remaining chunk; [0] is the one to choose for
        obs.distortion[i][level]       what a level costs in quality (nats); falls as the level rises
        obs.transfers                  chunks that have arrived, newest last: .bytes, .end_s, .goodput_bps; initially ()
        obs.in_flight                  chunks in transfer: .bytes, .received_bytes, .first_byte_s; initially ()
        obs.decode_s, obs.prefill_s    estimated seconds to decode a chunk, and from the last chunk to the first token
        """
        if not obs.transfers:
            return Choice(self.first)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        size_bytes = obs.sizes_bytes[0][0]
        return Choice(0, reason={"rate_bps": rate_bps, "expected_s": size_bytes * 8 / rate_bps})
