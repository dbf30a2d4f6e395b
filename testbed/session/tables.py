"""What a manifest and the costs say of each chunk, in the form that an observation shows."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TypeAlias

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.estimates import ComputeEstimates
from kvstream.testbed.store.manifest import Manifest

Rows: TypeAlias = tuple[
    tuple[int, ...],
    tuple[tuple[int, ...], ...],
    tuple[int, ...],
    tuple[tuple[float, ...], ...],
    tuple[float, ...] | None,
]


class ChunkTables:
    """Sizes, distortions and compute times of every chunk of a context."""

    def __init__(self, manifest: Manifest, costs: Costs) -> None:
        self.n_levels = len(manifest.levels)
        self.ladder = manifest.ladder
        """[level]: its distortion, the same for every chunk."""
        self._tokens, self._sizes_bytes, self._text_bytes = manifest.columns
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

    @property
    def prefill_s(self) -> float:
        """Seconds of prefill, as expected now."""
        return self._prefill_s * self.estimates.prefill

    def learn(self, chunk: int, level: LevelOrText | None, took_s: float) -> None:
        """Decoding or recomputing of a chunk took so long."""
        if isinstance(level, int):
            self.estimates.learn(self._spreads.decode, self._decode_s[chunk][level], took_s)
        elif self._recompute_s:
            self.estimates.learn(self._spreads.recompute, self._recompute_s[chunk], took_s)

    def rows(self, remaining: Sequence[int]) -> Rows:
        """What an `Observation` shows of the remaining chunks (ascending): tokens, bytes by level, bytes as text, and
        the seconds, as expected now, of decoding by level and of recomputing."""
        first, stop = (remaining[0], remaining[-1] + 1) if remaining else (0, 0)
        of = itemgetter(slice(first, stop)) if stop - first == len(remaining) else itemgetter(*remaining)
        decode_s, recompute_s = of(self._decode_s), self._recompute_s and of(self._recompute_s)
        now = self.estimates
        if now.decode != 1.0:
            by = now.decode
            decode_s = tuple([tuple([by * level_s for level_s in row]) for row in decode_s])
        if now.recompute != 1.0 and recompute_s:
            recompute_s = tuple([now.recompute * chunk_s for chunk_s in recompute_s])
        return of(self._tokens), of(self._sizes_bytes), of(self._text_bytes), decode_s, recompute_s
