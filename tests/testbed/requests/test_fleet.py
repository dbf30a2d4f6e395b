"""Who serves which request, and what the store then holds; over real links in tests/emulation/test_requests.py."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvstream.testbed.config import build
from kvstream.testbed.errors import SpecError
from kvstream.testbed.requests import fleet
from kvstream.testbed.requests.fleet import Board
from kvstream.testbed.simulator import orders
from kvstream.testbed.simulator.orders import Waiting
from kvstream.testbed.simulator.requests import Fleet, Serving, simulate
from kvstream.testbed.workloads import request_trace, synthetic
from kvstream.testbed.workloads.request_trace import RequestTrace
from kvstream.traces.trace import Trace

A40 = synthetic.parse("mistral-7b,compute=a40")
LINK = Trace("constant", [1e6], [1e9], end="hold")


@dataclass(frozen=True)
class Longest:
    """An order of one's own: nobody waits for more than a second."""

    def key(self, waiting: Waiting) -> float:
        return -waiting.tokens

    def admit(self, waiting: Waiting, now_s: float) -> bool:
        return now_s - waiting.arrival_s < 1.0


def serving(order: orders.AnyOrder | None = None, receivers: int = 2, deadline_s: float = 1.0) -> Serving:
    given = Fleet(receivers=receivers, slots=1, cache=0)
    return Serving(A40, "kvstream", lambda: build.make_policy("text"), LINK, deadline_s, fleet=given,
                   order=order or orders.Fcfs())  # fmt: skip


def without_reuse(n: int, seed: int) -> tuple[RequestTrace, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(100, 4000, n).tolist()
    blocks = [[1000 * number + block for block in range(-(-count // 512))] for number, count in enumerate(tokens)]
    trace = request_trace.of_requests("t", np.cumsum(rng.exponential(0.15, n)).tolist(), tokens, [1] * n, blocks)
    return trace, trace.arrivals_s


def carried_out(trace: RequestTrace, arrivals_s: np.ndarray, given: Serving) -> Board:
    """In virtual time: receivers that only compute."""
    board, idle, busy, now_s = Board(trace, arrivals_s, given), list(range(given.fleet.receivers)), [], 0.0
    while board.left:
        coming_s = board.arrive(now_s)
        while idle and (found := board.take(idle[0], now_s)):
            request, blocks = found
            took_s = A40.forward_s(512 * blocks, int(trace.tokens[request]))
            heapq.heappush(busy, (now_s + took_s, idle.pop(0), request))
        if busy and (coming_s is None or busy[0][0] <= coming_s):
            now_s, receiver, request = heapq.heappop(busy)
            board.finish(request, now_s, None, [])
            idle = sorted([*idle, receiver])
        elif coming_s is not None:
            now_s = coming_s
    return board


@pytest.mark.parametrize("order", ["fcfs", "shortest", "fcfs,admit=feasible", "shortest,admit=feasible", "longest"])
@pytest.mark.parametrize("receivers", [1, 3])
def test_it_is_the_simulators_queue(order: str, receivers: int) -> None:
    given = serving(Longest() if order == "longest" else orders.parse(order), receivers)
    trace, arrivals_s = without_reuse(80, seed=receivers)
    board, simulated = carried_out(trace, arrivals_s, given), simulate(trace, arrivals_s, given)
    assert board.turned_away.tolist() == simulated.turned_away.tolist()
    assert board.turned_away.any() == ("fcfs" != order != "shortest")
    served = ~board.turned_away
    assert (board.done_s - arrivals_s)[served] == pytest.approx(simulated.ttft_s[served], abs=1e-6)


def test_a_prompts_whole_blocks_are_stored_from_its_first_token_on() -> None:
    blocks = [[0, 1, 2], [0, 1, 3], [0, 1], [0, 1, 2, *range(9, 16)]]
    trace = request_trace.of_requests("t", [0.0, 1.0, 2.0, 3.0], [1500, 1500, 1024, 5000], [1] * 4, blocks)
    board = Board(trace, trace.arrivals_s, serving())
    board.arrive(0.0)
    assert board.take(0, 0.0) == (0, 0)
    assert board.arrive(1.0) == 2.0
    assert board.take(1, 1.0) == (1, 0), "the first is not done"
    board.finish(0, 1.5, None, [])
    board.arrive(3.0)
    assert board.take(0, 3.0) == (2, 1), "the last token is always computed"
    assert board.take(0, 3.0) == (3, 2), "a block that is not full is not stored"
    board.finish(1, 3.1, {"bytes": 70, "levels": ["text", 0]}, [1024, 512])
    assert board.bytes[1] == 70
    assert board.loss[1] == pytest.approx(512 * A40.ladder("kvstream")[0].distortion)
    board.finish(2, None, None, [])
    assert np.isinf(board.done_s[2]), "a request that failed"
    assert board.left == 1


@pytest.mark.parametrize(
    "given",
    [{"slots": 2, "cache": 0}, {"slots": 1}, {"slots": 1, "cache": 0, "store": 1024}, {"slots": 1, "link": "own"}],
)
def test_what_real_receivers_are_not_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="slots=1,cache=0"):
        fleet.check(Fleet(**given))
    fleet.check(Fleet(slots=1, cache=0))
