"""What a link is beside its trace: the settings of `--link`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from kvstream.testbed.errors import SpecError
from kvstream.traces.units import Fraction, Number

if TYPE_CHECKING:
    from kvstream.traces.trace import Trace

MAX_GSO_BYTES: Final = 65_536
MAX_DELAY_S: Final = 10.0


@dataclass(frozen=True)
class LinkSettings:
    """Settings of an emulated path. Raises SpecError for impossible ones.

    A trace with columns of delay or loss adds them to what is set here, row by row.

    Delay and jitter apply to each direction; loss, reordering and duplication only toward the receivers.
    """

    delay_s: float = 0.0
    """One way, in each direction: the round trip grows by twice this."""
    jitter_s: float = 0.0
    """Each packet's delay is drawn evenly from delay ± jitter."""
    jitter_order: bool = True
    """Jitter keeps packets in order (a packet waits for the one before). Off: they overtake each other, one by one: it
    switches `offloads` off."""
    loss: Fraction = 0.0
    """Mean fraction of packets lost. Counts packets of one MTU: it switches `offloads` off."""
    loss_burst: Number = 0.0
    """Mean length of a bad spell in packets (Gilbert-Elliott); 0: losses are independent."""
    loss_bad: Fraction = 1.0
    """Fraction lost in a bad spell; none is lost outside."""
    reorder: Fraction = 0.0
    """Fraction of packets that are not delayed at all and so overtake."""
    duplicate: Fraction = 0.0
    """Fraction of packets that arrive twice."""
    queue_s: float = 0.05
    """Length of the bottleneck's drop-tail queue, as time at the rate in force: a byte limit re-set at each change."""
    queue_bytes: int | None = None
    """A fixed length of that queue instead."""
    cc: str = "cubic"
    """Congestion control of every connection through the link."""
    mtu: int = 1500
    offloads: bool = True
    """Segmentation offloads (GSO, TSO, GRO): packets travel the emulated path in groups sized to the trace's rates.
    Off: one MTU each, which costs CPU above some 2 Gbit/s."""
    cross_flows: int = 0
    """Cross traffic: TCP flows that compete for the bottleneck all the time, with the same congestion control."""
    cross_trace: str = ""
    """Cross traffic: a trace (a name or a file) at whose rates datagrams pass the bottleneck during a session."""
    up_trace: str = ""
    """A trace (a name or a file) that limits the reverse path to the senders; without one it is not limited."""
    senders: int = 1
    """A run's senders, each behind a link of its own to the shared path: chunk i of a context comes from i mod N."""
    pin: bool = False
    """Keep senders on one half of the cores and receivers on the other."""
    impair: Literal["auto", "netem", "nfqueue"] = "auto"
    """What delays and loses: the kernel's netem, our element on NFQUEUE, or the first of them that can."""
    seed: int = 1
    """Of every random draw on the path."""

    def __post_init__(self) -> None:
        _check(0.0 <= self.delay_s <= MAX_DELAY_S, f"delay={self.delay_s:g} s", f"0 to {MAX_DELAY_S:g} s")
        _check(0.0 <= self.jitter_s <= self.delay_s, f"jitter={self.jitter_s:g} s", "0 up to the delay")
        for name in ("loss", "reorder", "duplicate"):
            value = getattr(self, name)
            _check(0.0 <= value < 1.0, f"{name}={value:g}", "a fraction below 1, as in 0.1%")
        _check(0.0 < self.loss_bad <= 1.0, f"loss_bad={self.loss_bad:g}", "a fraction above 0 and up to 100%")
        _check(
            self.loss_burst == 0.0 or (self.loss_burst >= 1.0 and self.loss < self.loss_bad),
            f"loss_burst={self.loss_burst:g} with loss={self.loss:g} and loss_bad={self.loss_bad:g}",
            "at least 1 packet, and a mean loss below that of a bad spell",
        )
        _check(self.reorder == 0.0 or self.delay_s > 0.0, f"reorder={self.reorder:g}", "it with a delay to overtake")
        _check(0.0 < self.queue_s <= 60.0, f"queue={self.queue_s:g} s", "above 0 and at most 60 s")
        _check(576 <= self.mtu <= 65_000, f"mtu={self.mtu}", "576 to 65000 bytes")
        _check(
            self.queue_bytes is None or self.mtu + 14 <= self.queue_bytes < 1 << 31,
            f"queue_bytes={self.queue_bytes}",
            f"at least one packet ({self.mtu + 14}) and less than 2 GiB",
        )
        _check(1 <= self.senders <= 100, f"senders={self.senders}", "1 to 100")
        _check(0 <= self.cross_flows <= 100, f"cross_flows={self.cross_flows}", "0 to 100")
        _check(self.cc.replace("_", "").isalnum(), f"cc={self.cc!r}", "the name of a congestion control")

    def impaired(self, traces: Iterable[Trace] = ()) -> bool:
        """Whether anything but the shaper touches packets: these settings, or the delays and losses of a trace."""
        mine = any((self.delay_s, self.loss, self.reorder, self.duplicate))
        return mine or any(varies(trace) for trace in traces)

    @property
    def crossed(self) -> bool:
        """Whether there is cross traffic through the bottleneck."""
        return bool(self.cross_flows or self.cross_trace)

    def grouped(self, traces: Iterable[Trace] = ()) -> bool:
        """Whether segmentation offloads are in use: single packets must be single to be lost or overtaken alone."""
        overtaken = self.reorder or (self.jitter_s and not self.jitter_order)
        harmed = any((self.loss, overtaken, self.duplicate)) or any(trace.loss is not None for trace in traces)
        return self.offloads and not harmed

    def gso_bytes(self, traces: Sequence[Trace] = ()) -> int:
        """Most bytes that travel as one packet: some 1 ms at the lowest rate of the traces, 5 us at the highest.

        A queue releases a packet as a whole, so larger ones blur the trace and can exceed a short queue, while
        smaller ones cost CPU at high rates.
        """
        if not self.grouped(traces):
            return self.mtu
        rates = [float(rate) for trace in traces for rate in trace.rates_bps if rate > 0.0]
        if not rates:
            return MAX_GSO_BYTES
        wanted = max(min(rates) * 1e-3, max(rates) * 5e-6) / 8.0
        return int(min(max(wanted, self.mtu), MAX_GSO_BYTES))


def varies(trace: Trace) -> bool:
    """Whether a trace says more than rates: it has columns of delay or loss."""
    return trace.delay_s is not None or trace.loss is not None


def _check(good: bool, what: str, allowed: str) -> None:
    if not good:
        raise SpecError(f"link setting {what}: use {allowed}")
