"""How the simulator, the oracle and the bound model a link: a goodput over time and one round trip.

An emulated link may do more than that; `left_out` says what the model omits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.trace import Trace

if TYPE_CHECKING:
    from kvstream.testbed.emulator.link import LinkSettings


def goodput(trace: Trace, link: LinkSettings) -> Trace:
    """The trace in application bits per second."""
    return trace.scaled(goodput_per_capacity(link.mtu))


def round_trip_s(trace: Trace, link: LinkSettings) -> float:
    """Twice the link's delay and the mean of the trace's own."""
    return 2.0 * (link.delay_s + trace.mean_delay_s)


def carried_bps(trace: Trace, link: LinkSettings, offset_s: float, length_s: float) -> float | None:
    """Mean goodput of the `length_s` before `offset_s`: what a session got that has just ended there. None where the
    trace begins later, carries nothing then, or has one rate per chunk."""
    if trace.per == "chunk" or offset_s < length_s:
        return None
    bits = trace.bits_by(offset_s) - trace.bits_by(offset_s - length_s)
    return bits / length_s * goodput_per_capacity(link.mtu) or None


def left_out(traces: Iterable[Trace], links: Iterable[LinkSettings]) -> str:
    """How the model differs from these links, as the predicate of a sentence; empty if it does not."""
    traces = list(traces)
    links = list(links)
    varying = any(trace.delay_s is not None and np.ptp(trace.delay_s) > 0.0 for trace in traces)
    unknown = {
        "losses": any(link.loss for link in links) or any(t.loss is not None and t.loss.any() for t in traces),
        "cross traffic": any(link.crossed for link in links),
        "reordering": any(link.reorder or not link.jitter_order for link in links),
        "duplicates": any(link.duplicate for link in links),
        "the reverse path's rate limit": any(link.up_trace for link in links),
    }
    words = ["replaces varying delays by their mean"] * (varying or any(link.jitter_s for link in links))
    if any(_is_short(link, trace) for link in links for trace in traces):
        words.append("lets TCP fill links whose queue is shorter than the bandwidth-delay product")
    if any(unknown.values()):
        words.append(f"omits {', '.join(word for word, there in unknown.items() if there)}")
    return " and ".join([part for part in (", ".join(words[:-1]), *words[-1:]) if part])


def _is_short(link: LinkSettings, trace: Trace) -> bool:
    """Whether the bottleneck's queue holds less than a round trip of the link's highest rate: after a loss, TCP leaves
    such a link idle for a while."""
    round_trip = round_trip_s(trace, link)
    if link.queue_bytes is None:
        return link.queue_s < round_trip
    return link.queue_bytes * 8.0 < trace.peak_bps * round_trip
