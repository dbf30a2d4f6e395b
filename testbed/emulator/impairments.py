"""Delay, jitter, loss, reordering and duplication on a middle host of their own, before the bottleneck.

Two backends with the same settings: the kernel's netem, where there is one, and our element on NFQUEUE
(`kvstream.testbed.emulator.element`). Neither ever sits on the sender, whose TCP would take the held packets for its
own backlog, nor on the shaped interface, whose rate would then count them. What was chosen is in `settings`, for the
manifest.
"""

from __future__ import annotations

import itertools
import json
import select
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.emulator.element import LATE_BINS_S
from kvstream.testbed.emulator.link import LinkSettings, varies
from kvstream.testbed.emulator.topology import DELAY_HOST, Network
from kvstream.testbed.errors import MachineError

if TYPE_CHECKING:
    from kvstream.traces.trace import Trace

LEFT, RIGHT = f"{DELAY_HOST}-left", f"{DELAY_HOST}-right"
IPTABLES: Final = ("iptables", "iptables-legacy", "iptables-nft")
"""Tried in this order: nft variants need a kernel with the nft queue or its compatibility layer."""
NETEM_LIMIT: Final = 1 << 18
"""Packets that netem may hold; its default of 1000 is a second bottleneck at high rates."""
NETEM_FIELDS: Final = ("delay_s", "jitter_s", "loss", "loss_burst", "loss_bad", "reorder", "duplicate")
START_S: Final = 10.0
ELEMENT_DIED: Final = "the element that delays packets died"


class Impairments:
    """What delays and loses packets on a network that is being built; lives as long as the network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.link = network.link
        self._element: subprocess.Popen[str] | None = None
        self._seeded = True
        self._before: dict[str, Any] = {}
        """The counters at the session's start."""
        refused = unfit_for_netem(self.link, network.traces)
        if self.link.impair == "netem" and refused is not None:
            raise MachineError(f"netem cannot {refused}: omit impair=netem, and our element will")
        if refused is None and self.link.impair != "nfqueue":
            refused = self._try_netem()
            if self.link.impair == "netem" and refused is not None:
                raise MachineError(f"this kernel has no netem ({refused}): use impair=nfqueue, or load sch_netem")
        self.backend = "nfqueue" if refused is not None or self.link.impair == "nfqueue" else "netem"
        self.settings: dict[str, Any] = {
            "backend": self.backend,
            "why_not_netem": refused,
            "seeded": self._seeded or self.backend == "nfqueue",
        }
        if self.backend == "nfqueue":
            self._start_element()

    def report(self) -> dict[str, Any]:
        """Counters so far: of the element per direction (to the receivers first), or what `tc -s` says of netem."""
        if self._element is None:
            lines = [
                self.network.run(self._host, ["tc", "-s", "-j", "qdisc", "show", "dev", dev]) for dev in (RIGHT, LEFT)
            ]
            return {"backend": "netem", "lanes": [json.loads(line)[0] for line in lines]}
        self._tell({"report": True})
        line = self._line()
        if not line:
            raise MachineError(ELEMENT_DIED)
        return {"backend": "nfqueue", **json.loads(line)}

    def begin(self, trace: Trace | None, t0_s: float, length_s: float) -> None:
        """A session starts at `t0_s` (CLOCK_MONOTONIC), and with it the delays and losses of its trace."""
        self._before = self.report()
        if trace is None or not varies(trace):
            return
        rows, steps, at_s = trace.sliced(0.0, length_s), [], t0_s
        for row, duration_s in enumerate(rows.durations_s.tolist()):
            delay_s = 0.0 if rows.delay_s is None else float(rows.delay_s[row])
            loss = 0.0 if rows.loss is None else float(rows.loss[row])
            steps.append([at_s, self.link.delay_s + delay_s, 1.0 - (1.0 - self.link.loss) * (1.0 - loss)])
            at_s += duration_s
        self._tell({"steps": steps})

    def end(self) -> dict[str, Any]:
        """The session is over: back to the link's own settings. What was done to its packets, as `handled` says."""
        done = handled(self._before, self.report())
        if self._element is not None:
            self._tell({"steps": [[0.0, self.link.delay_s, self.link.loss]]})
        return done

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._element is not None
        assert self._element.stdin is not None
        try:
            self._element.stdin.write(json.dumps(what) + "\n")
            self._element.stdin.flush()
        except BrokenPipeError:
            raise MachineError(ELEMENT_DIED) from None

    @property
    def _host(self) -> Any:
        return self.network.hosts[DELAY_HOST]

    def _try_netem(self) -> str | None:
        """Set netem up in both directions; the reason when the kernel will not. Says in `_seeded` whether it has our
        seed: Linux and iproute2 before 6.6 know of none."""
        seeded = []
        for interface, forward in ((RIGHT, True), (LEFT, False)):
            words = ["dev", interface, "root", "netem", "limit", str(NETEM_LIMIT)]
            words += netem_words(self.link, forward=forward)
            seed = (2 * self.link.seed + forward) % (1 << 64)  # the two directions must not draw the same
            try:
                try:
                    self.network.run(self._host, ["tc", "qdisc", "add", *words, "seed", str(seed)])
                except MachineError:
                    self.network.run(self._host, ["tc", "qdisc", "add", *words])
                (qdisc,) = json.loads(self.network.run(self._host, ["tc", "-j", "qdisc", "show", "dev", interface]))
            except MachineError as error:
                return str(error).rpartition(": ")[2]
            if qdisc["kind"] != "netem":
                return f"asked for netem, got {qdisc['kind']}"
            seeded.append(qdisc.get("options", {}).get("seed") == seed)
        self._seeded = all(seeded)
        return None

    def _start_element(self) -> None:
        settings = {name: getattr(self.link, name) for name in NETEM_FIELDS}
        settings |= {"ordered": self.link.jitter_order, "seed": self.link.seed}
        settings["lossy"] = bool(self.link.loss) or any(trace.loss is not None for trace in self.network.traces)
        self._element = self.network.popen(
            self._host,
            [sys.executable, "-m", "kvstream.testbed.emulator.element", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._line() != "ready":
            assert self._element.stderr is not None
            trouble = self._element.stderr.read().strip().splitlines() or ["it died"]
            raise MachineError(f"cannot delay packets without netem: {trouble[-1]}; the kernel needs nfnetlink_queue")
        self.settings["iptables"] = self._fill_queues()

    def _line(self) -> str:
        assert self._element is not None
        assert self._element.stdout is not None
        if not select.select([self._element.stdout], [], [], START_S)[0]:
            raise MachineError("the element that delays packets does not answer")
        return self._element.stdout.readline().strip()

    def _fill_queues(self) -> str:
        """Send what is forwarded through the queues; the iptables program that could."""
        troubles = []
        for program in IPTABLES:
            try:
                for number, interface in enumerate((LEFT, RIGHT)):
                    self.network.run(
                        self._host,
                        [program, "-w", "-A", "FORWARD", "-i", interface, "-j", "NFQUEUE", "--queue-num", str(number)],
                    )
                return program
            except MachineError as error:
                troubles.append(str(error))
            except FileNotFoundError:
                troubles.append(f"`{program}` is missing")
        raise MachineError(
            f"cannot delay packets without netem: {troubles[0]}; run `sudo apt-get install iptables`, "
            "and `sudo modprobe xt_NFQUEUE` where the kernel has it as a module"
        )


def handled(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What happened between two reports, both directions together.

    `dropped` were lost on purpose. `lost_by_kernel` never reached the element. 99 % of the packets went at most
    `late_p99_s` after they were due, to the next of LATE_BINS_S; None is later than the last. netem tells neither.
    """
    lanes = list(zip(before["lanes"], after["lanes"], strict=True))

    def grown(name: str) -> int:
        return int(sum(now[name] - then[name] for then, now in lanes))

    if after["backend"] == "netem":
        return {"backend": "netem", "packets": grown("packets"), "dropped": grown("drops")}
    late = [sum(now["late"][i] - then["late"][i] for then, now in lanes) for i in range(len(LATE_BINS_S) + 1)]
    within = list(itertools.accumulate(late))
    first = next(i for i, count in enumerate(within) if count >= 0.99 * within[-1])
    return {
        "backend": "nfqueue",
        "packets": grown("packets"),
        "dropped": grown("dropped"),
        "lost_by_kernel": grown("lost_by_kernel"),
        "late_p99_s": LATE_BINS_S[first] if first < len(LATE_BINS_S) else None,
    }


def unfit_for_netem(link: LinkSettings, traces: Iterable[Trace]) -> str | None:
    """What the path asks for that netem cannot do, on any kernel."""
    if link.jitter_s and link.jitter_order:
        return "keep packets in order under jitter (jitter_order=off would let them overtake)"
    if any(varies(trace) for trace in traces):
        return "follow a trace's delays and losses"
    return None


def netem_words(link: LinkSettings, *, forward: bool) -> list[str]:
    """The arguments of `tc qdisc ... netem` for one direction."""
    words = ["delay", f"{link.delay_s * 1e6:.0f}us"]
    if link.jitter_s:
        words.append(f"{link.jitter_s * 1e6:.0f}us")
    if not forward:
        return words
    if link.loss and link.loss_burst:
        leave = 1.0 / link.loss_burst
        share = link.loss / link.loss_bad
        enter = leave * share / (1.0 - share)
        words += ["loss", "gemodel", *(f"{100.0 * part:.6f}%" for part in (enter, leave, link.loss_bad, 0.0))]
    elif link.loss:
        words += ["loss", f"{100.0 * link.loss:.6f}%"]
    if link.duplicate:
        words += ["duplicate", f"{100.0 * link.duplicate:.6f}%"]
    if link.reorder:
        words += ["reorder", f"{100.0 * link.reorder:.6f}%"]
    return words
