"""What the steps of a session are expected to take, in the light of those that it has done.

log(actual / estimated) of a step is taken to be `shared` times one number of the session, and `own` times one of the
step's, both standard normal (`Spread`). The steps done so far say where the session's number lies; it moves the
estimates of all steps to come, prefill included, and what is known of it narrows their spread. That is the posterior of
a factor model with one factor, in closed form.
"""

from __future__ import annotations

import math
from typing import Final

from kvstream.testbed.session.costs import Costs, Spread

OVERRUN: Final = 0.15
"""A step that is late is taken to need so much of the time that it has had. With this part of it, a decoding that is
late ends with even odds (`Spreads` of real sessions)."""
LARGEST: Final = 3.0
"""A step that took e to this times its estimate, or so much less, counts as one that did: an outlier says no more."""


class ComputeEstimates:
    """Factors on the estimates of each kind of step, and their spreads, after what was learned."""

    def __init__(self, costs: Costs) -> None:
        self._spreads = costs.spreads
        self._weight = 1.0
        self._sum = 0.0
        self._update()

    def learn(self, spread: Spread, expected_s: float, took_s: float) -> None:
        """A step of this spread, estimated before the session to take `expected_s`, took `took_s`."""
        if spread.shared == 0.0 or not expected_s > 0.0:
            return
        far = math.log(max(took_s, 1e-9) / expected_s)
        own = max(spread.own, 0.01) ** 2
        self._sum += spread.shared * min(max(far, -LARGEST), LARGEST) / own
        self._weight += spread.shared**2 / own
        self._update()

    def _update(self) -> None:
        mean, variance = self._sum / self._weight, 1.0 / self._weight
        kinds = (self._spreads.decode, self._spreads.recompute, self._spreads.prefill)
        self.decode, self.recompute, self.prefill = (math.exp(kind.shared * mean) for kind in kinds)
        """Times the estimate from before the session."""
        self.decode_spread, self.recompute_spread, self.prefill_spread = (
            math.sqrt(kind.shared**2 * variance + kind.own**2) for kind in kinds
        )
        """Standard deviation of log(actual / estimated) of a step to come."""
