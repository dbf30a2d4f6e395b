"""Replays a trace and measures how well: what `kvstream trace replay --measure` and the benchmark run."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, Final

from kvstream.testbed.emulator import fidelity, traffic
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.path import open_path
from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.errors import SpecError
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.trace import Trace

LEAD_S: Final = 0.05
FILL_S: Final = 0.5
"""Traffic runs this long before the session, so that the queue is full at its start."""


@dataclass(frozen=True)
class Measurement:
    """A replay: what the link did, the verdict on it, and what backlogged TCP flows got out of it, if any ran."""

    trace: str
    link: LinkSettings
    record: LinkRecord
    verdict: fidelity.Fidelity
    shares_bps: tuple[float, ...]
    """Goodput at each receiver, over the session; empty without traffic."""
    goodput_per_trace: float | None
    """Their sum as a fraction of what the trace and the framing allow."""

    @property
    def goodput_bps(self) -> float | None:
        """At all receivers together."""
        return sum(self.shares_bps) if self.shares_bps else None

    def to_json(self) -> dict[str, Any]:
        facts = {"trace": self.trace, "length_s": self.record.length_s, "goodput_bps": self.goodput_bps}
        return facts | {
            "shares_bps": list(self.shares_bps),
            "goodput_per_trace": self.goodput_per_trace,
            "verdict": self.verdict.to_json(),
            "settings": dict(self.record.settings),
            "lateness_s": self.record.lateness_s,
            "rows": self.record.rows(),
        }

    def text(self) -> str:
        """A few lines for a terminal."""
        verdict, late = self.verdict, sorted(self.record.lateness_s) or [0.0]
        lines = [
            f"{self.trace}: {self.record.length_s:g} s, {len(self.record.changes)} changes of rate, half of them "
            f"late by up to {late[len(late) // 2] * 1e3:.2f} ms, 99 % by up to {verdict.lateness_p99_s * 1e3:.2f} ms"
        ]
        lines += judgement(verdict)[:-1]
        if self.goodput_bps is not None and self.goodput_per_trace is not None:
            each = " + ".join(f"{share / 1e6:.2f}" for share in self.shares_bps)
            who, total = "one TCP flow got", each
            if len(self.shares_bps) > 1:
                who = f"{len(self.shares_bps)} TCP flows, a receiver each, got"
                total = f"{each} = {self.goodput_bps / 1e6:.2f}"
            lines.append(
                f"{who} {total} Mbit/s of goodput, {self.goodput_per_trace:.1%} of what the trace allows; "
                f"{verdict.drops} packets dropped at the queue"
            )
        fills = "; --measure fills it" if verdict.full_s == 0.0 and self.goodput_bps is None and verdict.ok else ""
        lines.append(judgement(verdict)[-1] + fills)
        return "\n".join(lines)


def judgement(verdict: fidelity.Fidelity) -> list[str]:
    """A verdict in lines: what was found, if anything was judged, and the verdict itself."""
    lines = []
    if verdict.total_error is not None:
        errors = [f"in all {verdict.total_error:.2%}"]
        if verdict.median_error is not None and verdict.p95_error is not None:
            errors[:0] = [f"median error {verdict.median_error:.2%}", f"95 % below {verdict.p95_error:.2%}"]
        much = f"{verdict.windows} windows, {verdict.backlogged_s:.1f} s backlogged"
        lines.append(f"bytes against the trace: {', '.join(errors)} ({much})")
    if not verdict.ok:
        prefix = "" if verdict.state == "unjudged" else "invalid: "
        lines.append(prefix + "; ".join(verdict.reasons))
    elif verdict.full_s == 0.0:
        lines.append("nothing to judge: the link was never full")
    else:
        lines.append(f"valid; {verdict.coverage:.0%} of the time judged")
    return lines


def replay(
    trace: Trace,
    link: LinkSettings,
    length_s: float,
    *,
    fill: bool = True,
    receivers: int = 1,
    limits: fidelity.Limits | None = None,
) -> Measurement:
    """Replay `length_s` seconds of a trace, with a TCP flow to each receiver that takes all it can get (`fill`), or
    without traffic. Inside a sandbox only.
    """
    if trace.per == "chunk":
        raise SpecError(f"trace {trace.name!r} has one rate per chunk and no time line: replay one with per=time")
    shares: tuple[float, ...] = ()
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(open_path(link, [trace], receivers=receivers))
        network = path.network
        clients = []
        if fill:
            server = traffic.start_server(network, network.sender, network.sender_ip)
            stack.callback(traffic.end, server)
            for host in network.receiver_hosts:
                seconds = FILL_S + LEAD_S + length_s + 0.5
                clients.append(traffic.start_pull(network, host, network.sender_ip, seconds=seconds))
                stack.callback(traffic.end, clients[-1])
            time.sleep(FILL_S)
        t0_s = time.monotonic() + LEAD_S
        path.arm(trace, t0_s, length_s)
        record = path.finish(t0_s + length_s).down
        results = [traffic.result_of(client) for client in clients]
        shares = tuple(traffic.rate_between(result, t0_s, t0_s + length_s) for result in results)
    verdict = fidelity.judge(record, trace, limits)
    allowed = trace.bits_by(length_s) / length_s * goodput_per_capacity(link.mtu)
    share = sum(shares) / allowed if shares and allowed > 0.0 else None
    return Measurement(trace.name, link, record, verdict, shares, share)
