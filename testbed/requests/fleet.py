"""Requests in time over an emulated link: real receivers, each a process, share one bottleneck and one sender.

What `simulator.requests` does in virtual time, done by processes: a request waits until a receiver is free, in the
order of `orders`; what the store holds of its prompt is fetched at the levels that its policy chooses, the rest
computed, and its full blocks are in the store from its first token on. Computing takes the times of the workload's
profile. Receivers serve one request at a time and keep no cache of their own.
"""

from __future__ import annotations

import heapq
import math
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.api import TEXT
from kvstream.testbed.emulator import fidelity
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.path import LinkPath, open_path
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.host.process import Process
from kvstream.testbed.requests import prefixes
from kvstream.testbed.simulator.orders import Fcfs, Shortest, Waiting
from kvstream.testbed.simulator.requests import Fleet, Outcome, Serving
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS, RequestTrace
from kvstream.traces.trace import Trace

PORT: Final = 8700
LEAD_S: Final = 0.2
COVERED_S: Final = 3600.0
"""A trace is scheduled for so long."""
ANSWER_S: Final = 150.0
"""A receiver gives a session up after two minutes."""
WARM_UP_DEADLINE_S: Final = 60.0
LEAST_DEADLINE_S: Final = 0.001
"""What a policy is told that is asked for a request whose deadline has passed."""


class Board:
    """Which requests wait, which blocks the store holds, and what became of the requests. It has no clock."""

    def __init__(self, trace: RequestTrace, arrivals_s: NDArray[np.float64], serving: Serving) -> None:
        self._trace, self._arrivals_s, self._serving = trace, arrivals_s, serving
        self._stored = np.zeros(trace.n_blocks, bool)
        self._waiting: list[tuple[float, int]] = []
        self._next = 0
        n = len(trace)
        self.left = n
        self.begin_s, self.done_s = np.zeros(n), np.full(n, math.inf)
        self.receiver, self.stored = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.bytes, self.loss = np.zeros(n, np.int64), np.zeros(n)
        self.turned_away = np.zeros(n, bool)

    def arrive(self, now_s: float) -> float | None:
        """Let those in that have come; when the next one comes, None after the last."""
        while self._next < len(self._trace) and self._arrivals_s[self._next] <= now_s:
            heapq.heappush(self._waiting, (self._key(self._next), self._next))
            self._next += 1
        return float(self._arrivals_s[self._next]) if self._next < len(self._trace) else None

    def take(self, receiver: int, now_s: float) -> tuple[int, int] | None:
        """The next request for a free receiver, and how many blocks of it to fetch; None if none waits. Those that the
        order does not admit are turned away on the way."""
        while self._waiting:
            _, request = heapq.heappop(self._waiting)
            if not self._admits(request, now_s):
                self.turned_away[request] = True
                self.left -= 1
                continue
            blocks = self._held(request)
            self.begin_s[request], self.receiver[request] = now_s, receiver
            self.stored[request] = blocks * BLOCK_TOKENS
            return request, blocks
        return None

    def finish(
        self, request: int, done_s: float | None, record: Mapping[str, Any] | None, tokens: Sequence[int]
    ) -> None:
        """A request's first token is out, or, without `done_s`, will never be. `tokens`: of each chunk fetched."""
        self.left -= 1
        if done_s is None:
            return
        self.done_s[request] = done_s
        firsts = self._trace.firsts
        whole = int(self._trace.tokens[request]) // BLOCK_TOKENS
        self._stored[self._trace.blocks[firsts[request] : firsts[request + 1]][:whole]] = True
        if record is not None:
            distortion = [rung.distortion for rung in self._serving.workload.ladder(self._serving.codec)]
            self.bytes[request] = record["bytes"]
            self.loss[request] = sum(
                count * distortion[level]
                for count, level in zip(tokens, record["levels"], strict=True)
                if level != TEXT
            )

    def _held(self, request: int) -> int:
        """Blocks from the first on that the store holds; the last token is always computed."""
        most = (int(self._trace.tokens[request]) - 1) // BLOCK_TOKENS
        first = self._trace.firsts[request]
        mine = self._stored[self._trace.blocks[first : self._trace.firsts[request + 1]][:most]]
        return len(mine) if mine.all() else int(mine.argmin())

    def _look(self, request: int) -> Waiting:
        tokens, stored = int(self._trace.tokens[request]), self._held(request) * BLOCK_TOKENS
        prefill_s = self._serving.workload.forward_s(stored, tokens)
        arrival_s = float(self._arrivals_s[request])
        return Waiting(request, arrival_s, self._serving.deadline_s, tokens, stored, prefill_s)

    def _key(self, request: int) -> float:
        order = self._serving.order
        if isinstance(order, Fcfs):
            return float(self._arrivals_s[request])
        looked = self._look(request)
        return looked.prefill_s if isinstance(order, Shortest) else float(order.key(looked))

    def _admits(self, request: int, now_s: float) -> bool:
        order = self._serving.order
        if isinstance(order, Fcfs | Shortest):
            if order.admit == "all":
                return True
            looked = self._look(request)
            return now_s - looked.arrival_s + looked.prefill_s <= looked.deadline_s
        admit = getattr(order, "admit", None)
        return admit is None or bool(admit(self._look(request), now_s))


@dataclass(frozen=True)
class Served:
    """What became of the requests over the link, and whether the link did what its trace says."""

    outcome: Outcome
    verdict: fidelity.Fidelity


class Crew:
    """A path, a sender and warm receivers, made by `open_crew`."""

    def __init__(
        self, path: LinkPath, receivers: Sequence[Process], ids: Mapping[tuple[str, int], str], trace: Trace
    ) -> None:
        self._path, self._receivers, self._ids, self._trace = path, receivers, ids, trace
        self._pool = ThreadPoolExecutor(len(receivers), thread_name_prefix="receiver")
        self.settings = path.settings

    def warm_up(self) -> None:
        """Have every receiver look at all contexts, and fetch the shortest of each codec: what is done for the first
        time takes longer, and memory is taken now."""
        prepare = {"cmd": "prepare", "contexts": list(self._ids.values())}
        for _ in self._pool.map(lambda receiver: receiver.ask(prepare, ANSWER_S), self._receivers):
            pass
        for context in (self._ids[codec, 1] for codec in dict.fromkeys(codec for codec, _ in self._ids)):
            command = self._command(context, 1, "lowest", WARM_UP_DEADLINE_S)
            for answer in self._pool.map(partial(_ask, command), self._receivers):
                if answer["status"] != "ok":
                    raise MachineError(f"the warm-up failed: {answer['error']}")

    def serve(self, trace: RequestTrace, arrivals_s: NDArray[np.float64], policy: str, serving: Serving) -> Served:
        """All requests, as `simulator.requests.simulate` takes them; `policy` is the scheme's, as text."""
        board, idle = Board(trace, arrivals_s, serving), list(range(len(self._receivers)))
        busy_s = np.zeros(len(self._receivers))
        answers: queue.SimpleQueue[tuple[int, int, int, Any]] = queue.SimpleQueue()
        self._path.size_packets(self._trace)
        zero_s = time.monotonic() + LEAD_S
        self._path.arm(self._trace, zero_s, COVERED_S)
        while board.left:
            now_s = time.monotonic() - zero_s
            coming_s = board.arrive(now_s)
            while idle and (found := board.take(idle[0], now_s)):
                self._begin(idle.pop(0), *found, trace, policy, serving, now_s - float(arrivals_s[found[0]]), answers)
            if not board.left:
                break
            try:
                timeout_s = None if coming_s is None else max(0.0, zero_s + coming_s - time.monotonic())
                receiver, request, blocks, answer = answers.get(timeout=timeout_s)
            except queue.Empty:
                continue
            idle = sorted([*idle, receiver])
            if isinstance(answer, Exception):
                raise answer
            done_s = answer["end_s"] - zero_s if answer["status"] == "ok" else None
            busy_s[receiver] += answer.get("busy_s", 0.0)
            board.finish(request, done_s, answer.get("record"), _chunks(blocks, serving.fleet.chunk))
        ends_s = board.done_s[np.isfinite(board.done_s)]
        last_s = float(ends_s.max(initial=time.monotonic() - zero_s if not len(ends_s) else 0.0))
        record = self._path.finish(zero_s + last_s)
        first_s = float(arrivals_s[0])
        outcome = Outcome(
            arrivals_s=arrivals_s, tokens=trace.tokens, begin_s=board.begin_s, ttft_s=board.done_s - arrivals_s,
            deadline_s=serving.deadline_s, receiver=board.receiver, cached_tokens=np.zeros(len(trace), np.int64),
            stored_tokens=board.stored, bytes=board.bytes, loss=board.loss, turned_away=board.turned_away,
            delivered_bits=np.array([8.0 * record.down.delivered_bytes]),
            capacity_bits=self._trace.bits_by(last_s) - self._trace.bits_by(first_s), busy_s=busy_s,
            span_s=last_s - first_s,
        )  # fmt: skip
        return Served(outcome, record.judge(self._trace))

    def _begin(
        self, receiver: int, request: int, blocks: int, trace: RequestTrace, policy: str, serving: Serving,
        waited_s: float, answers: queue.SimpleQueue[tuple[int, int, int, Any]],
    ) -> None:  # fmt: skip
        context = self._ids[serving.codec, blocks] if blocks else None
        tokens = int(trace.tokens[request]) - blocks * BLOCK_TOKENS
        deadline_s = max(serving.deadline_s - waited_s, LEAST_DEADLINE_S)
        command = self._command(context, tokens, policy, deadline_s, serving.depth, request)
        asked = self._pool.submit(_ask, command, self._receivers[receiver])
        asked.add_done_callback(
            lambda done: answers.put((receiver, request, blocks, done.exception() or done.result()))
        )

    def _command(
        self, context: str | None, tokens: int, policy: str, deadline_s: float, depth: int = 2, seed: int = 0
    ) -> dict[str, Any]:
        url = f"http://{self._path.network.sender_ip}:{PORT}"
        asked = {"cmd": "request", "url": url, "context": context, "tokens": tokens, "policy": policy}
        return asked | {"deadline_s": deadline_s, "depth": depth, "seed": seed}

    def close(self) -> None:
        """Wait for no answer: the processes end next, and with them what is still asked."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def open_crew(
    serving: Serving, codecs: Sequence[str], workload: str, trace: Trace, link: LinkSettings, most: int, folder: Path
) -> Iterator[Crew]:
    """Build the path and start the processes; all end with the context. Requests have at most `most` blocks. Must be
    called inside a sandbox. Raises MachineError for what the machine lacks."""
    store, ids = prefixes.prepare(serving.workload, codecs, serving.fleet.chunk, most)
    with ExitStack() as stack:
        path = stack.enter_context(open_path(link, [trace]))

        def start(name: str, host: Any, module: str, *options: str) -> Process:
            argv = ["-m", module, "--store", str(store.path), *options]
            log = folder / f"{name}.log"
            return stack.enter_context(closing(Process(name, partial(path.network.popen, host), argv, log)))

        address = ("--host", "0.0.0.0", "--port", str(PORT))
        sender = start("sender", path.network.sender, "kvstream.testbed.net.sender", *address, "--sandbox")
        receivers = [
            start(f"receiver{i}", path.network.receiver, "kvstream.testbed.receiver", "--workload", workload)
            for i in range(serving.fleet.receivers)
        ]
        for process in (sender, *receivers):
            process.await_ready()
        crew = stack.enter_context(closing(Crew(path, receivers, ids, trace)))
        crew.warm_up()
        yield crew


def check(fleet: Fleet) -> None:
    """Raises SpecError for a fleet that real receivers cannot be."""
    if fleet.slots != 1 or fleet.cache != 0 or fleet.store is not None or fleet.link != "shared":
        raise SpecError(
            "over an emulated link receivers serve one request at a time, share the link and have no cache of their "
            "own: give --fleet receivers=8,slots=1,cache=0"
        )


def _ask(command: Mapping[str, Any], receiver: Process) -> dict[str, Any]:
    return receiver.ask(command, ANSWER_S)


def _chunks(blocks: int, chunk_tokens: int) -> list[int]:
    """Tokens of each chunk of so many blocks."""
    total = blocks * BLOCK_TOKENS
    return [min(chunk_tokens, total - start) for start in range(0, total, chunk_tokens)]
