"""What several policies compute from an observation; pure functions."""

from __future__ import annotations

from policies.api import Observation
from policies.errors import PolicyError


def named_level(level: int | str, n_levels: int) -> int:
    """`lowest`, `medium`, `highest` or a number, as a level; medium leans to the smaller side of an even ladder."""
    if level == "lowest":
        return 0
    if level == "medium":
        return (n_levels - 1) // 2
    if level == "highest":
        return n_levels - 1
    try:
        number = int(level)
    except ValueError:
        raise PolicyError(f"level {level!r}; give lowest, medium, highest or 0 to {n_levels - 1}") from None
    if not 0 <= number < n_levels:
        raise PolicyError(f"level {number} does not exist; give 0 to {n_levels - 1}")
    return number


def bytes_left(obs: Observation, level: int) -> int:
    """Bytes of all remaining chunks at one level."""
    return sum([sizes[level] for sizes in obs.sizes_bytes])


def bytes_in_flight(obs: Observation) -> int:
    """Bytes of the chunks under way that have not arrived."""
    return sum([flight.bytes - flight.received_bytes for flight in obs.in_flight])


def recompute_left_s(obs: Observation) -> float | None:
    """Seconds to recompute all remaining chunks; None where the receiver cannot."""
    return None if obs.recompute_s is None else sum(obs.recompute_s)


def last_bps(obs: Observation) -> float | None:
    """Goodput of the newest chunk, else the prior, else None."""
    return obs.transfers[-1].goodput_bps if obs.transfers else obs.prior_bps


def tail_s(obs: Observation, level: int) -> float:
    """Seconds of compute that no transfer hides: decoding the last chunk, then prefill."""
    return obs.decode_s[-1][level] + obs.prefill_s
