"""Delay, loss and disorder have the size that was asked for."""

from __future__ import annotations

import json
import statistics
from typing import ClassVar

import pytest

from kvstream.testbed.config.specs import build, parse_settings
from kvstream.testbed.emulator.impairments import Impairments, handled, netem_words
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.traces.trace import Trace


@pytest.mark.parametrize("delay_ms", [2, 20])
def test_a_delay_adds_twice_itself_to_the_round_trip(scenario, delay_ms):
    plain = statistics.median(scenario("round_trips", link="")["rtts_s"])
    # What else runs on a machine only ever adds to a round trip: the least of three medians is the link's own.
    tries = [scenario("round_trips", link=f"delay={delay_ms}ms") for _ in range(3)]
    done = min(tries, key=lambda one: statistics.median(one["rtts_s"]))
    assert statistics.median(done["rtts_s"]) - plain == pytest.approx(2 * delay_ms * 1e-3, abs=1.5e-3)
    assert min(min(one["rtts_s"]) for one in tries) > 2 * delay_ms * 1e-3
    assert done["settings"]["impairments"]["backend"] in ("netem", "nfqueue")


def test_jitter_spreads_and_keeps_order(scenario):
    done = scenario("round_trips", link="delay=10ms,jitter=5ms")["rtts_s"]
    assert statistics.pstdev(done) > 1e-3
    assert min(done) > 0.010
    arrived = scenario("datagrams", link="delay=10ms,jitter=5ms", count=400)["arrived"]
    assert arrived == list(range(400))


def test_jitter_without_order_lets_packets_overtake(scenario):
    arrived = scenario("datagrams", link="delay=10ms,jitter=5ms,jitter_order=off,impair=nfqueue", count=400)["arrived"]
    assert sorted(arrived) == list(range(400))
    assert arrived != sorted(arrived)


def test_losses_come_at_the_rate_asked_for_and_again_with_the_seed(scenario):
    count, loss = 4000, 0.05
    link = f"loss={loss:.0%},impair=nfqueue,seed=3"
    first, second = (scenario("datagrams", link=link, count=count) for _ in range(2))
    lost = count - len(first["arrived"])
    assert abs(lost - count * loss) < 4 * (count * loss * (1 - loss)) ** 0.5
    assert first["arrived"] == second["arrived"]
    assert first["report"]["lanes"][0]["dropped"] == lost


def test_bursts_of_loss_have_the_length_asked_for(scenario):
    count = 6000
    arrived = set(scenario("datagrams", link="loss=5%,loss_burst=6,impair=nfqueue", count=count)["arrived"])
    runs, run = [], 0
    for number in range(count):
        if number not in arrived:
            run += 1
        elif run:
            runs.append(run)
            run = 0
    assert statistics.mean(runs) == pytest.approx(6, rel=0.4)
    assert sum(runs) / count == pytest.approx(0.05, rel=0.5)


def test_duplicates_and_overtaking(scenario):
    count = 1000
    twice = scenario("datagrams", link="duplicate=10%,impair=nfqueue", count=count)["arrived"]
    assert len(twice) - len(set(twice)) == pytest.approx(0.1 * count, rel=0.4)
    assert len(set(twice)) == count
    early = scenario("datagrams", link="delay=20ms,reorder=10%,impair=nfqueue", count=count)["arrived"]
    assert sorted(early) == list(range(count))
    overtakers = sum(later > earlier for earlier, later in zip(sorted(early), early, strict=True))
    assert overtakers > 0.05 * count


def test_the_delays_of_a_trace_are_followed(scenario):
    done = scenario("changing", delays_ms=[0, 30, 10], losses=[0, 0, 0])
    for row, delay_ms in enumerate((0, 30, 10)):
        rtts = [rtt_s for at_s, rtt_s in done["pings"] if 0.5 * row + 0.1 < at_s < 0.5 * row + 0.4]
        assert statistics.median(rtts) == pytest.approx(2e-3 * (5 + delay_ms), abs=2e-3)


def test_the_losses_of_a_trace_are_followed(scenario):
    done = scenario("changing", delays_ms=[0, 0, 0, 0], losses=[0.5, 0.5, 0.5, 0.5])
    lost = done["report"]["lanes"][0]["dropped"]
    assert 3 <= lost <= 0.9 * len(done["pings"])


def test_netem_is_asked_for_the_same():
    link = build(LinkSettings, parse_settings("delay=20ms,loss=1%,loss_burst=4,duplicate=2%,reorder=3%"), "link")
    assert netem_words(link, forward=False) == ["delay", "20000us"]
    words = netem_words(link, forward=True)
    assert words[:2] == ["delay", "20000us"]
    assert words[2:4] == ["loss", "gemodel"]
    enter, leave, bad, good = (float(word.rstrip("%")) / 100 for word in words[4:8])
    assert enter / (enter + leave) * bad == pytest.approx(0.01, rel=1e-4)
    assert (1 / leave, bad, good) == (4, 1.0, 0.0)
    assert words[8:] == ["duplicate", "2.000000%", "reorder", "3.000000%"]


def lane(packets: int, dropped: int, late: list[int], lost: int = 0) -> dict[str, object]:
    return {"packets": packets, "dropped": dropped, "late": late, "lost_by_kernel": lost}


def test_what_was_done_to_packets_is_the_difference_of_two_reports():
    before = {"backend": "nfqueue", "lanes": [lane(10, 1, [9, 0, 0, 0, 0, 0, 0, 0, 0]), lane(0, 0, [0] * 9)]}
    for late, p99_s in (([109, 0, 0], 0.0001), ([107, 2, 0], 0.0002), ([9, 0, 100], 0.0005)):
        after = [lane(120, 11, [*late, 0, 0, 0, 0, 0, 0]), lane(30, 0, [30, *[0] * 8], lost=2)]
        done = handled(before, {"backend": "nfqueue", "lanes": after})
        assert (done["packets"], done["dropped"], done["lost_by_kernel"]) == (140, 10, 2)
        assert done["late_p99_s"] == p99_s
    never = [lane(20, 1, [9, 0, 0, 0, 0, 0, 0, 0, 10]), lane(0, 0, [0] * 9)]
    assert handled(before, {"backend": "nfqueue", "lanes": never})["late_p99_s"] is None
    assert handled(before, before)["packets"] == 0
    lanes = [[{"packets": n, "drops": n // 10}, {"packets": n, "drops": 0}] for n in (10, 60)]
    netem = [{"backend": "netem", "lanes": each} for each in lanes]
    assert handled(*netem) == {"backend": "netem", "packets": 100, "dropped": 5}


def test_a_session_s_record_has_what_was_done_to_its_packets(scenario):
    done = scenario("replay", rows=[[0.5, 20]], length_s=0.5, link="delay=5ms,loss=5%,impair=nfqueue")
    told = done["verdict"]["impairments"]
    assert told == done["record"]["impairments"]
    assert told["packets"] > 100
    assert told["lost_by_kernel"] == 0
    assert 0 < told["dropped"] < 0.2 * told["packets"]


class WithNetem:
    """A network on a kernel that has netem, as far as choosing needs one."""

    hosts: ClassVar = {"delay": None}

    def __init__(self, link: str, *traces: Trace) -> None:
        self.link, self.traces = build(LinkSettings, parse_settings(link, "link"), "link"), traces

    knows_seeds = True
    seeds: ClassVar[dict[str, int]] = {}

    def run(self, host: object, argv: list[str]) -> str:
        device = argv[argv.index("dev") + 1]
        if "show" in argv:
            return json.dumps([{"kind": "netem", "options": {"seed": self.seeds[device]} if self.knows_seeds else {}}])
        if "seed" in argv:
            if not self.knows_seeds:
                raise MachineError('`tc` on delay failed: What is "seed"?')
            self.seeds[device] = int(argv[argv.index("seed") + 1])
        return ""


@pytest.mark.parametrize("knows", [True, False])
def test_netem_is_seeded_where_it_can_be_and_it_is_said(knows, monkeypatch):
    monkeypatch.setattr(WithNetem, "knows_seeds", knows)
    found = Impairments(WithNetem("delay=5ms,seed=7"))
    assert found.settings == {"backend": "netem", "why_not_netem": None, "seeded": knows}
    if knows:
        assert len(set(WithNetem.seeds.values())) == 2
        first = dict(WithNetem.seeds)
        Impairments(WithNetem("delay=5ms,seed=8"))
        assert not set(first.values()) & set(WithNetem.seeds.values())


VARYING = Trace("varying", [1.0], [1e6], delay_s=[0.01])


@pytest.mark.parametrize(
    ("link", "traces", "backend"),
    [
        ("delay=5ms", [], "netem"),
        ("delay=5ms,impair=nfqueue", [], "nfqueue"),
        ("delay=5ms,jitter=1ms", [], "nfqueue"),
        ("delay=5ms,jitter=1ms,jitter_order=off", [], "netem"),
        ("", [VARYING], "nfqueue"),
        ("delay=5ms", [VARYING], "nfqueue"),
    ],
)
def test_netem_is_taken_where_it_can_do_it(link, traces, backend, monkeypatch):
    monkeypatch.setattr(Impairments, "_start_element", lambda self: None)
    found = Impairments(WithNetem(link, *traces))
    assert found.settings["backend"] == backend
    assert (found.settings["why_not_netem"] is None) == (backend == "netem" or "nfqueue" in link)


def test_netem_by_name_is_refused_for_what_it_cannot_do():
    for link, says in (("impair=netem", "delays and losses"), ("delay=5ms,jitter=1ms,impair=netem", "in order")):
        with pytest.raises(MachineError, match=says) as caught:
            Impairments(WithNetem(link, VARYING))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "delay=11s",
        "jitter=2ms",
        "loss=100%",
        "loss=5%,loss_bad=4%,loss_burst=3",
        "reorder=1%",
        "queue=0ms",
        "mtu=100",
        "cc=a b",
        "queue=50B",
        "queue=5%",
        "loss=20ms",
        "delay=0.1%",
        "loss_burst=3ms",
    ],
)
def test_impossible_settings_are_refused(text):
    with pytest.raises(SpecError):
        build(LinkSettings, parse_settings(text), "link")
