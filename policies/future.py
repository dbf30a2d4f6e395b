"""What a clairvoyant policy derives from its forecast and an observation."""

from __future__ import annotations

import math

from kvstream.policies.api import Forecast, Observation


def transfer_s(forecast: Forecast, start_s: float, size_bytes: float, chunk: int) -> float:
    """Seconds that `size_bytes` of `chunk` take on the true link from `start_s`; inf if they never arrive."""
    if start_s == math.inf:
        return math.inf
    trace = forecast.goodput
    if trace.per == "time":
        return trace.time_for(size_bytes * 8.0, start_s)
    rate = trace.chunk_rate(chunk)
    return size_bytes * 8.0 / rate if rate > 0.0 else math.inf


def flights(forecast: Forecast, obs: Observation) -> list[tuple[int, float, float]]:
    """(chunk, first byte, last byte) of every chunk in flight, oldest first, on the true link."""
    ends, free_s = [], obs.transfers[-1].end_s if obs.transfers else 0.0
    for flight in obs.in_flight:
        first_s = max(flight.since_s + forecast.rtt_s, free_s)
        if flight.received_bytes:
            free_s = obs.now_s + transfer_s(forecast, obs.now_s, flight.bytes - flight.received_bytes, flight.chunk)
        else:
            begin = max(first_s, obs.now_s)
            free_s = begin + transfer_s(forecast, begin, flight.bytes, flight.chunk)
        ends.append((flight.chunk, first_s, free_s))
    return ends


def begin_s(forecast: Forecast, obs: Observation) -> float:
    """When the answer to a request made now begins: after a round trip and after everything in flight."""
    under_way = flights(forecast, obs)
    return max(obs.now_s + forecast.rtt_s, under_way[-1][2] if under_way else 0.0)
