"""What the simulator, the oracle and the bound make of a link: a goodput over time and one round trip.

An emulated link may do more than that. What they leave out is said where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from traces.framing import goodput_per_capacity
from traces.trace import Trace

if TYPE_CHECKING:
    from testbed.emulator.link import LinkSettings


def goodput(trace: Trace, link: LinkSettings) -> Trace:
    """The trace in application bits per second."""
    return trace.scaled(goodput_per_capacity(link.mtu))


def round_trip_s(trace: Trace, link: LinkSettings) -> float:
    """Twice the link's delay and the mean of the trace's own."""
    return 2.0 * (link.delay_s + trace.mean_delay_s)


def left_out(traces: Iterable[Trace], links: Iterable[LinkSettings]) -> str:
    """What they do with these links instead of what happens, as the rest of a sentence; empty where nothing differs."""
    traces = list(traces)
    links = list(links)
    varying = any(trace.delay_s is not None and np.ptp(trace.delay_s) > 0.0 for trace in traces)
    unknown = {
        "losses": any(link.loss for link in links) or any(t.loss is not None and t.loss.any() for t in traces),
        "cross traffic": any(link.crossed for link in links),
        "packets out of order": any(link.reorder or not link.jitter_order for link in links),
        "duplicates": any(link.duplicate for link in links),
        "a limit of the way back": any(link.up_trace for link in links),
    }
    words = ["takes varying delays at their mean"] * (varying or any(link.jitter_s for link in links))
    if any(unknown.values()):
        words.append(f"does not know of {', '.join(word for word, there in unknown.items() if there)}")
    return " and ".join(words)
