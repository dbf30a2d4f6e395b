"""What a manifest and the costs say of each chunk, in the form that an observation shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.estimates import ComputeEstimates
from kvstream.testbed.store.manifest import Manifest


class ChunkTables:
    """Sizes, distortions and compute times of every chunk of a context."""

    def __init__(self, manifest: Manifest, costs: Costs) -> None:
        chunks = manifest.chunks
        self.n_levels = len(manifest.levels)
        self._ladder = tuple(level.distortion for level in manifest.levels)
        self._tokens = tuple(chunk.tokens for chunk in chunks)
        self._sizes_bytes = tuple(chunk.sizes_bytes for chunk in chunks)
        self._text_bytes = tuple(chunk.text_bytes for chunk in chunks)
        self._decode_s, self._recompute_s, self._prefill_s = costs.decode_s, costs.recompute_s, costs.prefill_s
        self._spreads = costs.spreads
        self.estimates = ComputeEstimates(costs)

    def size_bytes(self, chunk: int, level: LevelOrText) -> int:
        return self._text_bytes[chunk] if level == TEXT else self._sizes_bytes[chunk][int(level)]

    def cost_s(self, chunk: int, level: LevelOrText | None) -> float:
        """Seconds of decoding, or of recomputing, as expected now."""
        if isinstance(level, int):
            return self._decode_s[chunk][level] * self.estimates.decode
        return self._recompute_s[chunk] * self.estimates.recompute if self._recompute_s else 0.0

    def learn(self, chunk: int, level: LevelOrText | None, took_s: float) -> None:
        """Decoding or recomputing of a chunk took so long."""
        if isinstance(level, int):
            self.estimates.learn(self._spreads.decode, self._decode_s[chunk][level], took_s)
        elif self._recompute_s:
            self.estimates.learn(self._spreads.recompute, self._recompute_s[chunk], took_s)

    def rows(self, remaining: Sequence[int]) -> dict[str, Any]:
        """The fields of an `Observation` that run over the remaining chunks (ascending)."""
        rows: dict[str, Any] = {
            "tokens": self._tokens,
            "sizes_bytes": self._sizes_bytes,
            "text_bytes": self._text_bytes,
            "decode_s": self._decode_s,
            "recompute_s": self._recompute_s,
        }
        first, stop = (remaining[0], remaining[-1] + 1) if remaining else (0, 0)
        if stop - first == len(remaining):  # without a gap: a part of every table
            rows = {name: table and table[first:stop] for name, table in rows.items()}
        else:
            rows = {name: table and tuple([table[i] for i in remaining]) for name, table in rows.items()}
        now = self.estimates
        if now.decode != 1.0:
            by = now.decode
            rows["decode_s"] = tuple([tuple([by * level_s for level_s in row]) for row in rows["decode_s"]])
        if now.recompute != 1.0 and rows["recompute_s"]:
            rows["recompute_s"] = tuple([now.recompute * chunk_s for chunk_s in rows["recompute_s"]])
        rows["prefill_s"] = now.prefill * self._prefill_s
        rows["decode_spread"], rows["recompute_spread"] = now.decode_spread, now.recompute_spread
        rows["prefill_spread"] = now.prefill_spread
        rows["remaining"] = tuple(remaining)
        rows["distortion"] = (self._ladder,) * len(remaining)
        return rows
