"""Many requests in time: one of them is a session of the simulator, several are `simulate_shared`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.kvstream import KVStream
from kvstream.testbed.config import build
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator import concurrent, orders
from kvstream.testbed.simulator import simulator as sessions
from kvstream.testbed.simulator.requests import Fleet, Outcome, Serving, simulate
from kvstream.testbed.workloads import arrivals, request_trace, synthetic
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS, RequestTrace
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace

A40 = synthetic.parse("mistral-7b,compute=a40")
LATER_S = 100.0
"""When the store holds what the first request computed."""
BLOCKS, PROMPT = 20, 100
VARYING = "uniform,low=300Mbps,high=2Gbps,hold=0.2s,seed=5"


def constant(gbps: float) -> Trace:
    return Trace("constant", [1000.0], [gbps * 1e9], end="hold")


def following(times_s: list[float]) -> tuple[RequestTrace, np.ndarray]:
    """A request that fills the store, and others that share all its blocks."""
    n = 1 + len(times_s)
    blocks = [[*range(BLOCKS), 1000 + number] for number in range(n)]
    trace = request_trace.of_requests("t", [0.0, *times_s], [BLOCKS * BLOCK_TOKENS + PROMPT] * n, [1] * n, blocks)
    return trace, trace.arrivals_s


def serving(policy: str, codec: str = "kvstream", goodput: Trace | None = None, **given) -> Serving:
    given = {"deadline_s": 1.0, "fleet": Fleet(receivers=1, slots=1, cache=0)} | given
    return Serving(A40, codec, lambda: build.make_policy(policy), goodput or constant(1.0), **given)


def chats(n: int, rate: float) -> tuple[RequestTrace, np.ndarray]:
    trace = request_trace.read(request_trace.SAMPLE).repeated(n)
    return trace, arrivals.times_s(arrivals.Poisson(), trace, rate, 1)


# --- the same as elsewhere


@pytest.mark.parametrize("goodput", ["constant,rate=1Gbps", VARYING])
@pytest.mark.parametrize("deadline_s", [0.6, 1.0, 3.0])
@pytest.mark.parametrize(
    ("policy", "codec", "depth"),
    [
        ("text", "kvstream", 2), ("fixed,level=highest", "uniform", 2), ("fixed,level=highest", "uniform", 1),
        ("cachegen", "cachegen", 1), ("cachegen+compute", "cachegen", 2), ("throughput", "kvstream", 2),
        ("buffer-based", "kvstream", 2), ("kvstream", "kvstream", 2), ("kvstream", "kvstream", 1),
        ("mpc", "kvstream", 2), ("cake", "kvstream", 2),
    ],
)  # fmt: skip
def test_a_request_alone_is_a_session(policy, codec, depth, deadline_s, goodput):
    """Also the rules that are compiled here only, and policies that are asked in Python and reorder chunks."""
    link = open_trace(goodput)
    found = simulate(
        *following([LATER_S]), serving(policy, codec, link, deadline_s=deadline_s, depth=depth, rtt_s=0.01)
    )
    end = BLOCKS * BLOCK_TOKENS
    manifest = A40.manifest(str(end), codec, Fleet().chunk)
    costs = replace(A40.costs(manifest), prefill_s=A40.forward_s(end, end + PROMPT))
    settings = SessionSettings(deadline_s, depth=depth, seed=1)
    alone = sessions.simulate(
        manifest, build.make_policy(policy), link.shifted(LATER_S), settings, costs=costs, rtt_s=0.01
    )
    assert found.ttft_s[1] == pytest.approx(alone.ttft_s, abs=5e-6)
    assert (found.bytes[1], found.policy_faults) == (alone.bytes, 0)
    assert found.loss[1] / end == pytest.approx(alone.distortion)


def test_requests_that_share_link_and_engine_are_simulate_shared():
    offsets_s = [0.0, 0.05, 0.1, 0.3]
    fleet = Fleet(receivers=1, slots=len(offsets_s), cache=0)
    trace, times_s = following([LATER_S + at for at in offsets_s])
    found = simulate(trace, times_s, serving("lowest", "cachegen", open_trace(VARYING), fleet=fleet, rtt_s=0.01))
    end = BLOCKS * BLOCK_TOKENS
    manifest = A40.manifest(str(end), "cachegen", Fleet().chunk)
    costs = replace(A40.costs(manifest), prefill_s=A40.forward_s(end, end + PROMPT))
    requests = [concurrent.Request(manifest, build.make_policy("lowest"), costs, 1.0, at) for at in offsets_s]
    shared = concurrent.simulate_shared(requests, open_trace(VARYING).shifted(LATER_S), rtt_s=0.01)
    assert found.ttft_s[1:] == pytest.approx([one.record.ttft_s for one in shared], rel=0.01)
    assert found.bytes[1:].tolist() == [one.record.bytes for one in shared]


@dataclass
class InPython(KVStream):
    """The same policy under a name that is not compiled."""


def test_a_compiled_policy_is_the_one_in_python():
    trace, times_s = chats(300, 9.0)
    given = serving("kvstream", fleet=Fleet(receivers=4, slots=2, cache=20_000), goodput=constant(0.5), rtt_s=0.002)
    compiled, asked = simulate(trace, times_s, given), simulate(trace, times_s, replace(given, policy=InPython))
    assert asked.policy_faults == 0
    assert compiled.bytes.tolist() == asked.bytes.tolist()
    assert compiled.ttft_s == pytest.approx(asked.ttft_s, abs=1e-9)
    assert 0.2 < compiled.met.mean() < 0.98


# --- what must hold


@pytest.mark.parametrize("link", ["shared", "own"])
@pytest.mark.parametrize("slots", [1, 3])
def test_links_carry_what_was_sent_and_no_more_than_they_can(link, slots):
    trace, times_s = chats(1500, 12.0)
    given = serving("cachegen", "cachegen", open_trace(VARYING), depth=1,
                    fleet=Fleet(receivers=4, slots=slots, link=link, cache=0))  # fmt: skip
    found = simulate(trace, times_s, given)
    assert np.isfinite(found.ttft_s).all()
    manifests = 8.0 * 10_000 * len(trace)
    assert 8.0 * found.bytes.sum() <= found.delivered_bits.sum() + 8.0 * len(trace)
    assert found.delivered_bits.sum() <= 8.0 * found.bytes.sum() + manifests
    assert (found.delivered_bits <= found.capacity_bits).all()
    assert 0.05 < found.link_utilisation <= 1.0
    assert (found.busy_s <= found.span_s).all()
    for receiver in range(4):
        mine = found.receiver == receiver
        ends = [(at, 1) for at in found.begin_s[mine]] + [(at - 1e-6, -1) for at in (times_s + found.ttft_s)[mine]]
        assert np.cumsum([step for _, step in sorted(ends)]).max() <= slots


def test_more_requests_per_second_are_not_served_better():
    shares = []
    for rate in (2.0, 4.0, 8.0, 16.0):
        trace, times_s = chats(1000, rate)
        fleet = Fleet(receivers=8, cache=0)
        given = serving("cachegen", "cachegen", constant(10.0), depth=1, deadline_s=3.0, fleet=fleet)
        found = simulate(trace, times_s, given)
        shares.append(found.met.mean())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.7


def test_a_prefix_is_fetched_once_and_then_at_hand():
    trace, times_s = following([LATER_S, 2 * LATER_S])
    fleet = Fleet(receivers=2, cache=2 * BLOCKS * BLOCK_TOKENS)
    found = simulate(trace, times_s, serving("lowest", fleet=fleet))
    assert found.stored_tokens.tolist() == [0, 0, 0], "the first receiver computed it and keeps it"
    assert found.cached_tokens.tolist() == [0, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS]
    without = simulate(trace, times_s, serving("lowest", fleet=replace(fleet, cache=0)))
    assert without.stored_tokens.tolist() == [0, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS]
    small = simulate(trace, times_s, serving("lowest", fleet=replace(fleet, cache=0, store=5 * BLOCK_TOKENS)))
    assert small.stored_tokens.tolist() == [0, 5 * BLOCK_TOKENS, 5 * BLOCK_TOKENS], "the beginning is kept longest"
    assert simulate(trace, times_s, serving("lowest", fleet=replace(fleet, cache=0, store=0))).bytes.sum() == 0


def test_equal_times_and_a_prompt_that_is_stored_whole():
    """The last token is computed whatever is stored."""
    trace = request_trace.of_requests("t", [0.0, 9.0], [2 * BLOCK_TOKENS] * 2, [1, 1], [[0, 1], [0, 1]])
    found = simulate(trace, trace.arrivals_s, serving("lowest"))
    assert found.stored_tokens.tolist() == [0, BLOCK_TOKENS]


# --- orders, admission, policies of one's own


class Reversed:
    def __init__(self) -> None:
        self.seen: list[orders.Waiting] = []

    def key(self, waiting: orders.Waiting) -> float:
        self.seen.append(waiting)
        return -waiting.arrival_s

    def admit(self, waiting: orders.Waiting, now_s: float) -> bool:
        assert now_s >= waiting.arrival_s
        return waiting.number != 3


def begun(found: Outcome) -> list[int]:
    return [number for number in np.argsort(found.begin_s).tolist() if np.isfinite(found.ttft_s[number])]


def test_an_order_and_an_admission_in_python():
    trace, times_s = following([LATER_S, LATER_S + 0.01, LATER_S + 0.02, LATER_S + 0.03])
    order = Reversed()
    found = simulate(trace, times_s, serving("text", order=order))
    assert begun(found) == [0, 1, 4, 2]
    assert found.turned_away.tolist() == [False, False, False, True, False]
    assert [one.stored_tokens for one in order.seen] == [0, *[BLOCKS * BLOCK_TOKENS] * 4]


def test_shortest_first_serves_small_prompts_sooner():
    sizes = [40, 30, 2, 20, 1]
    blocks = [[100 * number + block for block in range(size)] for number, size in enumerate(sizes)]
    trace = request_trace.of_requests("t", [0.0] * 5, [size * BLOCK_TOKENS for size in sizes], [1] * 5, blocks)
    times_s = np.arange(5) * 1e-3
    assert begun(simulate(trace, times_s, serving("text"))) == [0, 1, 2, 3, 4]
    assert begun(simulate(trace, times_s, serving("text", order=orders.Shortest()))) == [0, 4, 2, 3, 1]
    feasible = simulate(trace, times_s, serving("text", order=orders.Fcfs("feasible"), deadline_s=4.0))
    assert feasible.turned_away.any()
    assert feasible.met.sum() > simulate(trace, times_s, serving("text", deadline_s=4.0)).met.sum()


def test_an_order_is_read_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Longest:\n    def key(self, waiting):\n        return -waiting.stored_tokens\n")
    assert hasattr(orders.parse(f"{file}:Longest"), "key")
    assert orders.parse("shortest,admit=feasible") == orders.Shortest("feasible")
    for wrong in ("random", "fcfs,admit=some", "fcfs,speed=2"):
        with pytest.raises(SpecError):
            orders.parse(wrong)


class Broken:
    def choose(self, obs: Observation) -> Choice:
        raise ValueError(obs.chunk)


class Counting:
    seen: list[int] = []  # noqa: RUF012

    def choose(self, obs: Observation) -> Choice:
        self.seen.append(obs.concurrent)
        return Choice(TEXT if obs.chunk % 2 else 0)


def test_a_policy_in_python_sees_how_many_share_its_receiver_and_may_fail():
    trace, times_s = following([LATER_S, LATER_S + 0.01, LATER_S + 0.02])
    Counting.seen = []
    given = serving("lowest", fleet=Fleet(receivers=1, slots=2, cache=0))
    simulate(trace, times_s, replace(given, policy=Counting))
    assert set(Counting.seen) == {1, 2}
    broken = simulate(trace, times_s, replace(given, policy=Broken))
    assert broken.policy_faults == 3 * -(-BLOCKS // 3)
    assert broken.bytes.tolist() == simulate(trace, times_s, given).bytes.tolist()


# --- what cannot be


def test_a_link_that_dies_leaves_requests_behind():
    trace, times_s = following([LATER_S])
    found = simulate(trace, times_s, serving("lowest", goodput=Trace("dies", [50.0], [1e9], end="stop")))
    assert found.ttft_s[1] == np.inf
    assert not found.met[1]
    assert not found.turned_away[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: serving("oracle"), lambda: serving("lowest", deadline_s=0.0), lambda: Fleet(receivers=0),
        lambda: Fleet(chunk=1000), lambda: Fleet(cache=-1),
        lambda: serving("lowest", goodput=open_trace("paper-uniform")),
    ],
    ids=["clairvoyant", "deadline", "receivers", "chunk", "cache", "per-chunk"],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(make):
    with pytest.raises(SpecError):
        make()


def test_more_blocks_than_memory_are_refused():
    trace, times_s = following([1.0])
    huge = replace(trace, blocks=trace.blocks + 10**9)
    with pytest.raises(SpecError, match="too many"):
        simulate(huge, times_s, serving("lowest"))
