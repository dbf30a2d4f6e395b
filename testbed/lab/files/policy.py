"""My policy. This is the only file you hand in: at most 60 lines.

kvstream lab check             how it does on six links
kvstream lab explain cliff 7   what it saw before chunk 7, what it chose, what the oracle would have done
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    """A new object is made for every session, so what you keep in `self` is forgotten afterwards."""

    careful: float = 0.9  # settings are dataclass fields; try: kvstream lab check policy.py:MyPolicy,careful=0.7

    def choose(self, obs: Observation) -> Choice:
        """Called once for every chunk. Level 0 is the smallest and worst, obs.n_levels - 1 the best.

        obs.now_s, obs.left_s          time since the request, time to the deadline (seconds)
        obs.chunk, obs.n_chunks        the chunk to choose for; how many there are
        obs.sizes_bytes[i][level]      bytes of the i-th remaining chunk; [0] is the one to choose for
        obs.distortion[i][level]       what a level costs in quality (nats); falls as the level rises
        obs.transfers                  chunks that have arrived, newest last: .bytes, .end_s, .goodput_bps; at first ()
        obs.in_flight                  chunks under way: .bytes, .received_bytes; at first ()
        obs.decode_s, obs.prefill_s    estimated seconds to decode a chunk, and from the last chunk to the first token
        """
        if not obs.transfers:
            return Choice(0)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        size_bytes = obs.sizes_bytes[0][0]
        return Choice(0, reason={"rate_bps": rate_bps, "expected_s": size_bytes * 8 / rate_bps})
