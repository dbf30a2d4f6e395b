"""Every policy on situations worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.policies import oracle, registry
from kvstream.policies.api import TEXT, Choice, Forecast, InFlight, Observation, Replace
from kvstream.policies.artifact import ArtifactOracle
from kvstream.policies.bola import Bola
from kvstream.policies.errors import PolicyError
from kvstream.policies.future import begin_s, flights
from kvstream.policies.kvstream import Case, KVStream, Plan, in_time, needed_bps
from kvstream.policies.measures import Pace, named_level, spend
from kvstream.policies.oracle import Oracle, line_ahead
from kvstream.traces.trace import Trace
from tests.policies.observations import arrived, observation


def choose(name: str, obs: Observation, **settings: Any) -> Choice:
    return registry.make(name, settings).choose(obs)


# sizes 100, 200 and 400 kB: four chunks left at 16 Mbit/s take 0.2, 0.4 and 0.8 s
def after(n: int, goodput_bps: float, left_s: float, **fields: Any) -> Observation:
    """Four chunks left of 4 + n, `left_s` seconds to the deadline."""
    transfers = arrived(n, goodput_bps)
    return observation(4 + n, done=n, transfers=transfers, now_s=1.0, deadline_s=1.0 + left_s, **fields)


class TestCacheGen:
    def test_text_wins_whenever_all_of_it_fits(self) -> None:
        assert choose("cachegen", after(1, 16e6, 0.9, recompute=0.2)).level == TEXT
        assert choose("cachegen", after(1, 16e6, 0.79, recompute=0.2)).level == 1

    @pytest.mark.parametrize(("left_s", "level"), [(0.81, 2), (0.79, 1), (0.41, 1), (0.39, 0), (0.21, 0), (0.1, 0)])
    def test_the_best_level_at_which_everything_left_fits(self, left_s: float, level: int) -> None:
        assert choose("cachegen", after(1, 16e6, left_s)).level == level

    def test_only_the_last_chunk_counts(self) -> None:
        transfers = (*arrived(1, 1e6), *arrived(1, 16e6))
        obs = observation(6, done=2, transfers=transfers, now_s=1.0, deadline_s=1.81)
        assert choose("cachegen", obs).level == 2

    def test_a_text_does_not_measure_the_link(self) -> None:
        transfers = list(arrived(2, 16e6))
        transfers[1] = transfers[1].__class__(1, TEXT, 400, 0.1, 0.15, 0.15, 64e3)
        obs = observation(6, done=2, transfers=tuple(transfers), now_s=1.0, deadline_s=1.81)
        assert choose("cachegen", obs).level == 2

    def test_no_level_fits_and_text_ends_sooner(self) -> None:
        assert choose("cachegen", after(1, 1e6, 0.1, recompute=0.5)).level == TEXT  # 2.0 s against 3.2 s
        assert choose("cachegen", after(1, 1e6, 0.1, recompute=0.9)).level == 0

    def test_the_first_chunk_takes_the_prior_or_the_medium_level(self) -> None:
        assert choose("cachegen", observation()).level == 1
        assert choose("cachegen", observation(), first="highest").level == 2
        assert choose("cachegen", observation(), first=0).level == 0
        assert choose("cachegen", observation(prior_bps=16e6)).level == 2
        assert choose("cachegen", observation(prior_bps=6e6)).level == 0

    def test_concurrent_requests_multiply_every_delay(self) -> None:
        assert choose("cachegen", after(1, 16e6, 0.81, concurrent=2)).level == 1
        assert choose("cachegen", after(1, 16e6, 0.81, concurrent=4)).level == 0
        assert choose("cachegen", after(1, 16e6, 0.81, recompute=0.2)).level == TEXT
        assert choose("cachegen", after(1, 16e6, 0.81, recompute=0.2, concurrent=2)).level == 1


class TestCacheGenCompute:
    def test_it_keeps_prefill_decoding_and_a_margin_free(self) -> None:
        # at the highest level the bytes take 0.8 s
        assert choose("cachegen+compute", after(1, 16e6, 1.02), margin=0.1).level == 2  # 0.202 s stay free
        assert choose("cachegen+compute", after(1, 16e6, 0.99), margin=0.1).level == 1
        assert choose("cachegen+compute", after(1, 16e6, 0.81), margin=0.0).level == 2
        assert choose("cachegen+compute", after(1, 16e6, 0.81, prefill_s=0.02), margin=0.0).level == 1
        assert choose("cachegen+compute", after(1, 16e6, 0.81, decode=0.02), margin=0.0).level == 1
        assert choose("cachegen", after(1, 16e6, 0.81, prefill_s=0.02, decode=0.02)).level == 2

    def test_text_has_to_leave_room_for_what_waits_and_for_prefill(self) -> None:
        obs = after(1, 16e6, 0.81, recompute=0.2)
        assert choose("cachegen+compute", obs, margin=0.0).level == TEXT
        assert choose("cachegen+compute", after(1, 16e6, 0.81, recompute=0.2, prefill_s=0.02), margin=0.0).level != TEXT
        late = after(1, 16e6, 0.81, recompute=0.2, compute_backlog_s=0.02)
        assert choose("cachegen+compute", late, margin=0.0).level != TEXT

    def test_it_counts_what_is_in_flight(self) -> None:
        flight = (InFlight(1, 0, 100_000, 50_000, 0.9),)
        assert choose("cachegen+compute", after(2, 16e6, 0.81, in_flight=flight), margin=0.0).level == 1

    def test_a_margin_is_a_fraction(self) -> None:
        with pytest.raises(PolicyError, match="margin"):
            registry.make("cachegen+compute", {"margin": 1.0})


class TestArtifact:
    def test_every_chunk_has_an_equal_slice_and_nothing_is_carried_over(self) -> None:
        obs = observation(4, done=1, transfers=arrived(1, 8e6), deadline_s=1.0)  # 0.1, 0.2, 0.4 s; a slice is 0.25 s
        assert choose("artifact", obs).level == 1
        late = observation(4, done=1, transfers=arrived(1, 8e6), deadline_s=1.0, now_s=5.0)
        assert choose("artifact", late).level == 1

    def test_text_or_the_smallest_level_when_no_level_fits_the_slice(self) -> None:
        slow = arrived(1, 1e6)
        assert choose("artifact", observation(4, done=1, transfers=slow, recompute=9.0)).level == TEXT
        assert choose("artifact", observation(4, done=1, transfers=slow)).level == 0

    def test_its_oracle_sees_the_rate_of_the_chunk_itself(self) -> None:
        policy = ArtifactOracle()
        policy.foresee(Forecast(Trace("c", np.array([]), np.array([8e6, 32e6]), per="chunk"), 0.0, 1))
        assert policy.choose(observation(4, deadline_s=1.0)).level == 1
        assert policy.choose(observation(4, done=1, transfers=arrived(1, 8e6), deadline_s=1.0)).level == 2

    @pytest.mark.parametrize("name", ["artifact-oracle", "oracle"])
    def test_without_a_forecast_it_says_so(self, name: str) -> None:
        with pytest.raises(PolicyError, match="foresee"):
            choose(name, observation())


class TestBufferBased:
    def test_the_lead_is_that_over_a_straight_line_to_the_deadline(self) -> None:
        pace = Pace()
        assert pace.lead_s(observation(4, now_s=0.1)) == pytest.approx(-0.1)
        half = observation(4, done=2, transfers=arrived(2, 8e6), now_s=0.3)
        assert pace.lead_s(half) == pytest.approx(0.5 - 0.3)
        flying = observation(
            4, done=3, transfers=arrived(2, 8e6), now_s=0.3, in_flight=(InFlight(2, 2, 400_000, 100_000, 0.2),)
        )
        assert pace.lead_s(flying) == pytest.approx(0.5625 - 0.3)

    @pytest.mark.parametrize(("now_s", "level"), [(0.49, 0), (0.40, 0), (0.30, 1), (0.27, 1), (0.19, 2), (0.1, 2)])
    def test_the_size_rises_over_the_cushion(self, now_s: float, level: int) -> None:
        # half has arrived: the lead is 0.5 - now; f rises from 100 kB at 0.1 to 400 kB at 0.3
        policy = registry.make("buffer-based", {"reservoir": 0.1, "cushion": 0.2})
        policy.choose(observation(4))
        assert policy.choose(observation(4, done=2, transfers=arrived(2, 8e6), now_s=now_s)).level == level

    def test_slack_and_backlog_are_other_buffers(self) -> None:
        roomy = observation(4, done=1, transfers=arrived(1, 80e6))
        assert choose("buffer-based", roomy, buffer="slack").level == 2
        assert choose("buffer-based", observation(4, done=1, transfers=arrived(1, 2e6)), buffer="slack").level == 0
        assert choose("buffer-based", observation(compute_backlog_s=0.5), buffer="backlog").level == 2
        assert choose("buffer-based", observation(), buffer="backlog").level == 0

    @pytest.mark.parametrize("settings", [{"buffer": "ring"}, {"cushion": 0.0}])
    def test_bad_settings_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(PolicyError, match="buffer-based"):
            registry.make("buffer-based", settings)


class TestBola:
    def test_the_ladder_is_climbed_between_its_two_leads(self) -> None:
        levels = []
        for lead_s in np.linspace(-0.05, 0.35, 41):
            policy = Bola(low=0.1, high=0.3)
            policy.choose(observation(4))
            half = observation(4, done=2, transfers=arrived(2, 8e6), now_s=0.5 - float(lead_s))
            levels.append(int(policy.choose(half).level))
        assert levels == sorted(levels)
        assert levels[0] == 0
        assert levels[-1] == 2
        assert levels.index(1) == pytest.approx(15, abs=1)  # a lead of 0.1
        assert levels.index(2) == pytest.approx(35, abs=1)  # a lead of 0.3

    def test_one_level_and_useless_levels(self) -> None:
        assert choose("bola", observation(sizes=(100_000,))).level == 0
        worse = observation(distortion=((0.1, 0.2, 0.2),) * 4)
        assert choose("bola", worse).level == 0

    def test_bad_settings_are_refused(self) -> None:
        with pytest.raises(PolicyError, match="low must be below high"):
            Bola(low=0.3, high=0.1)


class TestThroughput:
    def test_it_keeps_a_safety_factor_and_room_for_compute(self) -> None:
        assert choose("throughput", after(2, 16e6, 0.81), safety=1.0).level == 2
        assert choose("throughput", after(2, 16e6, 0.81)).level == 1
        assert choose("throughput", after(2, 16e6, 0.81, prefill_s=0.05), safety=1.0).level == 1
        assert choose("throughput", after(2, 16e6, 0.81, decode=0.05), safety=1.0).level == 1

    def test_it_counts_what_is_in_flight(self) -> None:
        flight = (InFlight(1, 0, 100_000, 50_000, 0.9),)
        assert choose("throughput", after(2, 16e6, 0.81, in_flight=flight), safety=1.0).level == 1

    def test_the_estimator_is_a_setting(self) -> None:
        transfers = (*arrived(1, 64e6), *arrived(1, 8e6))
        obs = observation(6, done=2, transfers=transfers, now_s=1.0, deadline_s=1.81)
        assert choose("throughput", obs, safety=1.0, estimator="arithmetic").level == 2
        assert choose("throughput", obs, safety=1.0, estimator="last").level == 1
        with pytest.raises(PolicyError, match="estimator"):
            registry.make("throughput", {"estimator": "crystal"})


class TestMPC:
    @pytest.mark.parametrize("name", ["mpc", "robust-mpc", "chance"])
    def test_more_time_never_lowers_the_level(self, name: str) -> None:
        levels = [choose(name, after(3, 16e6, left_s)).level for left_s in np.linspace(0.05, 1.5, 30)]
        assert levels == sorted(levels)  # type: ignore[type-var]
        assert {levels[0], levels[-1]} == {0, 2}

    def test_it_buys_what_saves_most_per_byte_and_keeps_the_rest_for_later(self) -> None:
        # 1.2 MB fit: all four chunks at 200 kB and two of them at 400 kB, which can wait
        assert choose("mpc", after(3, 16e6, 0.6)).level == 1

    def test_errors_make_the_robust_one_careful(self) -> None:
        transfers = (*arrived(1, 32e6), *arrived(1, 8e6), *arrived(1, 16e6))
        obs = observation(7, done=3, transfers=transfers, now_s=1.0, deadline_s=1.9)
        assert choose("mpc", obs).level == 1
        assert choose("robust-mpc", obs).level == 0

    def test_a_smaller_accepted_risk_is_more_careful(self) -> None:
        obs = after(3, 16e6, 0.9)
        assert choose("chance", obs, risk=0.5).level == 2
        assert choose("chance", obs, risk=0.001).level == 1

    def test_text_when_nothing_fits_and_it_ends_sooner(self) -> None:
        for name in ("mpc", "robust-mpc", "chance", "throughput"):
            assert choose(name, after(2, 1e6, 0.1, recompute=0.1)).level == TEXT
            assert choose(name, after(2, 1e6, 0.1, recompute=2.0)).level == 0

    def test_bad_settings_are_refused(self) -> None:
        with pytest.raises(PolicyError, match="horizon"):
            registry.make("mpc", {"horizon": 0})
        with pytest.raises(PolicyError, match="risk"):
            registry.make("chance", {"risk": 1.5})


class TestSpend:
    def test_by_hand(self) -> None:
        sizes, loss = [[1.0, 2.0, 4.0]] * 3, [[8.0, 4.0, 2.0]] * 3
        assert spend(sizes, loss, 2.9) is None
        assert spend(sizes, loss, 3.0) == [0, 0, 0]
        assert spend(sizes, loss, 4.5) == [0, 0, 1]  # of equal steps the later one first
        assert spend(sizes, loss, 6.0) == [1, 1, 1]
        assert spend(sizes, loss, 99.0) == [2, 2, 2]

    def test_levels_above_the_hull_are_passed_over(self) -> None:
        assert spend([[1.0, 2.0, 3.0]], [[9.0, 8.0, 1.0]], 2.5) == [0]
        assert spend([[1.0, 2.0, 3.0]], [[9.0, 8.0, 1.0]], 3.0) == [2]

    def test_it_never_spends_more_and_is_close_to_the_best(self) -> None:
        rng = np.random.default_rng(5)
        for _ in range(50):
            sizes = np.sort(rng.uniform(1, 10, (4, 3)), axis=1)
            loss = -np.sort(-rng.uniform(0, 1, (4, 3)), axis=1)
            budget = float(rng.uniform(sizes[:, 0].sum(), sizes[:, -1].sum()))
            levels = spend(sizes.tolist(), loss.tolist(), budget)
            assert levels is not None
            rows = np.arange(4)
            assert sizes[rows, levels].sum() <= budget + 1e-9
            grid = np.indices((3,) * 4).reshape(4, -1).T
            fits = [combo for combo in grid if sizes[rows, combo].sum() <= budget]
            best = min(loss[rows, combo].sum() for combo in fits)
            assert loss[rows, levels].sum() <= best + loss.max()


class TestBaselines:
    def test_they_do_what_they_are_called(self) -> None:
        obs = observation(recompute=0.1)
        assert choose("fixed", obs).level == 1
        assert choose("fixed", obs, level=2).level == 2
        assert choose("fixed", obs, level="2").level == 2
        assert choose("lowest", obs).level == 0
        assert choose("highest", obs).level == 2
        assert choose("text", obs).level == TEXT
        assert choose("text", observation()).level == 0

    def test_random_draws_every_level_and_follows_the_seed(self) -> None:
        policy = registry.make("random", {"text": True})
        draws = Counter(policy.choose(observation(recompute=0.1)).level for _ in range(400))
        assert set(draws) == {0, 1, 2, TEXT}
        assert min(draws.values()) > 60
        one, other = (
            [p.choose(observation(seed=s)).level for _ in range(20)]
            for s, p in ((1, registry.make("random")), (2, registry.make("random")))
        )
        assert one != other

    @pytest.mark.parametrize("level", [-1, 3, "best"])
    def test_a_level_that_does_not_exist_is_an_error_that_says_which_do(self, level: int | str) -> None:
        with pytest.raises(PolicyError, match="0 to 2"):
            named_level(level, 3)

    def test_medium_leans_to_the_smaller_side(self) -> None:
        assert [named_level("medium", n) for n in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]


class TestCakeAndHiCache:
    def test_cake_feeds_an_idle_receiver_and_loads_from_the_back(self) -> None:
        idle = observation(4, recompute=0.1)
        assert choose("cake", idle) == Choice(TEXT, chunk=0)
        busy = observation(4, recompute=0.1, compute_backlog_s=0.1)
        assert choose("cake", busy) == Choice(2, chunk=3)
        known = observation(4, done=1, transfers=arrived(1, 16e6), recompute=0.1, compute_backlog_s=0.1)
        assert choose("cake", known, level="lowest").chunk == 3  # 0.05 s to load, 0.1 s of work
        assert choose("cake", known).level == TEXT  # 0.2 s to load

    def test_the_last_chunk_goes_the_way_that_ends_sooner(self) -> None:
        last = observation(4, done=3, transfers=arrived(3, 16e6), recompute=0.1)
        assert choose("cake", last).level == TEXT
        slow = observation(4, done=3, transfers=arrived(3, 16e6), recompute=0.3)
        assert choose("cake", slow).level == 2

    def test_cake_without_a_model_loads_in_order(self) -> None:
        assert choose("cake", observation()) == Choice(2)

    def test_hicache_fetches_until_its_timeout(self) -> None:
        policy = registry.make("hicache", {"base_s": 0.2, "per_ki_token_s": 0.256})  # 400 tokens: 0.3 s
        assert policy.choose(observation(recompute=0.1, now_s=0.29)).level == 2
        flight = (InFlight(0, 2, 400_000, 1000, 0.1),)
        assert policy.progress(observation(recompute=0.1, now_s=0.29, in_flight=flight)) == "keep"  # type: ignore[attr-defined]
        assert policy.progress(observation(recompute=0.1, now_s=0.31, in_flight=flight)) == Replace(TEXT)  # type: ignore[attr-defined]
        assert policy.choose(observation(recompute=0.1, now_s=0.31)).level == TEXT
        assert policy.choose(observation(now_s=0.31)).level == 2

    def test_the_deadline_caps_the_timeout(self) -> None:
        assert choose("hicache", observation(recompute=0.1, now_s=0.49)).level == 2
        assert choose("hicache", observation(recompute=0.1, now_s=0.51)).level == TEXT

    def test_the_timeout_has_a_bound_of_its_own(self) -> None:
        assert choose("hicache", observation(recompute=0.1, now_s=0.19), max_s=0.2).level == 2
        assert choose("hicache", observation(recompute=0.1, now_s=0.21), max_s=0.2).level == TEXT


class TestKVStream:
    def test_text_alone_when_all_of_it_fits(self) -> None:
        assert choose("kvstream", observation(recompute=0.16, compute_backlog_s=0.1)).level == TEXT

    def test_compute_is_fed_from_the_front_and_the_link_from_the_back(self) -> None:
        idle = choose("kvstream", observation(8, recompute=0.3, rtt_s=0.02))
        assert (idle.level, idle.chunk, idle.reason["texts"]) == (TEXT, 0, 2)
        busy = observation(8, recompute=0.3, rtt_s=0.02, compute_backlog_s=0.3)
        assert choose("kvstream", busy).chunk == 7
        fast = observation(8, done=1, transfers=arrived(1, 80e6), recompute=0.15, compute_backlog_s=0.1)
        assert choose("kvstream", fast).chunk == 7  # a chunk takes 0.04 s at most
        slow = observation(8, done=1, transfers=arrived(1, 16e6), recompute=0.15, compute_backlog_s=0.1)
        assert choose("kvstream", slow).level == TEXT  # and here 0.2 s

    def test_no_text_that_could_not_be_recomputed_in_time(self) -> None:
        assert choose("kvstream", observation(8, recompute=0.3, now_s=0.75, rtt_s=0.02)).level != TEXT

    def test_a_receiver_that_others_share_is_not_idle(self) -> None:
        """Text only where all that is left fits, every step as often as there are requests."""
        assert choose("kvstream", observation(8, recompute=0.3, rtt_s=0.02)).level == TEXT
        assert choose("kvstream", observation(8, recompute=0.3, rtt_s=0.02, concurrent=2)).level != TEXT
        assert choose("kvstream", observation(8, recompute=0.04, concurrent=2)).level == TEXT
        assert choose("kvstream", observation(8, recompute=0.04, concurrent=3)).level != TEXT
        alone, shared = (choose("kvstream", after(3, 16e6, 1.2, prefill_s=0.1, concurrent=n)).level for n in (1, 8))
        assert shared < alone

    def test_compute_that_varies_leaves_room_for_fewer_texts(self) -> None:
        exact = observation(8, recompute=0.1, now_s=0.16)
        varying = observation(8, recompute=0.1, now_s=0.16, recompute_spread=0.15)
        assert choose("kvstream", exact).reason["texts"] == 8
        texts = [choose("kvstream", varying, target=target).reason["texts"] for target in (0.5, 0.95, 0.99)]
        assert texts == [8, 6, 5]

    def test_compute_that_varies_lowers_the_level(self) -> None:
        def levels(spread: float) -> list[Any]:
            waits = {"prefill_s": 0.3, "prefill_spread": spread}
            return [choose("kvstream", after(3, 16e6, x, **waits)).level for x in np.linspace(0.3, 3.0, 40)]

        exact, varying = levels(0.0), levels(0.4)
        assert all(low <= high for low, high in zip(varying, exact, strict=True))
        assert varying != exact

    def test_a_level_must_be_decoded_in_time_too(self) -> None:
        """However fast the link is."""
        decode_s = ((0.02, 0.04, 0.08),) * 4
        levels = [int(choose("kvstream", after(3, 1e9, x, decode_s=decode_s)).level) for x in (0.4, 0.3, 0.1, 0.05)]
        assert levels == [2, 1, 0, 0]
        busy = after(3, 1e9, 0.4, decode_s=decode_s, compute_backlog_s=0.2)
        assert choose("kvstream", busy).level == 1

    def test_chunks_shorter_than_a_round_trip_take_one(self) -> None:
        near, far = (choose("kvstream", after(3, 64e6, 0.4, rtt_s=rtt_s)).level for rtt_s in (0.001, 0.08))
        assert near > far

    def test_a_first_choice_risks_little_where_there_is_little_to_spare(self) -> None:
        """Of a link that it knows nothing of."""
        few, many = (choose("kvstream", observation(n, deadline_s=1.0)).level for n in (1, 16))
        assert few == 0
        assert many > 0

    def test_chunks_go_in_order_where_nothing_can_be_recomputed(self) -> None:
        assert choose("kvstream", after(3, 16e6, 0.5)).chunk == 3

    def test_a_session_that_cannot_be_saved_loses_no_time(self) -> None:
        assert choose("kvstream", after(3, 16e6, 0.001)).level == 0
        assert choose("kvstream", after(3, 16e6, -0.5)).level == 0
        assert choose("kvstream", after(3, 1e3, 0.5)).level == 0

    def test_a_prior_is_a_first_estimate(self) -> None:
        levels = [int(choose("kvstream", observation(prior_bps=bps)).level) for bps in (1e6, 8e6, 3e7, 1e9)]
        assert levels == sorted(levels)
        assert (levels[0], levels[-1]) == (0, 2)

    @pytest.mark.parametrize(
        "settings", [{"target": 1.0}, {"target": 0.0}, {"memory": 0.0}, {"spread": 0.0}, {"spread": math.inf}]
    )
    def test_bad_settings_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(PolicyError, match="kvstream"):
            registry.make("kvstream", settings)


@st.composite
def in_session(draw: st.DrawFn, *, texts: bool = False) -> Observation:
    """A moment of a session on links of 0.1 Mbit/s to 10 Gbit/s, with time left or not."""
    n, done = draw(st.integers(1, 16)), draw(st.integers(0, 8))
    scale = 10.0 ** draw(st.floats(3.3, 7.3))
    sizes = tuple(int(scale * 1.6**level) for level in range(draw(st.integers(1, 6))))
    bps = 10.0 ** draw(st.floats(5.0, 10.0))
    flight = InFlight(done, 0, sizes[0], sizes[0] // 2, 0.1, 0.12)
    return observation(
        n + done,
        sizes,
        done=done,
        recompute=10.0 ** draw(st.floats(-4.0, 1.0)) if texts else None,
        decode=10.0 ** draw(st.floats(-5.0, 0.0)),
        transfers=arrived(done, bps, sizes[0]),
        in_flight=(flight,) if done and draw(st.booleans()) else (),
        now_s=draw(st.floats(0.0, 3.0)),
        deadline_s=draw(st.floats(0.05, 3.0)),
        prefill_s=draw(st.floats(0.0, 0.5)),
        decode_spread=draw(st.sampled_from([0.0, 0.26])),
        recompute_spread=draw(st.sampled_from([0.0, 0.14])),
        prefill_spread=draw(st.sampled_from([0.0, 0.15])),
        compute_backlog_s=draw(st.sampled_from([0.0, 0.05, 0.5])),
        rtt_s=draw(st.sampled_from([None, 0.0, 0.02, 0.2])),
        prior_bps=draw(st.sampled_from([None, bps])),
    )


class TestReplacing:
    """Sizes are 100, 200 and 400 kB; what is in flight is the last of eight chunks at the highest level."""

    def answer(self, received: int, goodput_bps: float, left_s: float, **fields: Any) -> Any:
        policy = registry.make("kvstream+replace")
        start = observation(8, prior_bps=1e9)
        assert policy.choose(start) == Choice(2, chunk=0, reason=policy.choose(start).reason)
        flight = InFlight(0, 2, 400_000, received, 0.9, first_byte_s=0.95, **fields.pop("flight", {}))
        obs = after(4, goodput_bps, left_s, in_flight=(flight,), **fields)
        return policy.progress(obs)  # type: ignore[attr-defined]

    def test_kept_while_there_is_time(self) -> None:
        assert self.answer(0, 100e6, 2.0) == "keep"

    def test_replaced_where_what_is_left_of_it_would_take_too_long(self) -> None:
        assert self.answer(0, 8e6, 0.6) == Replace(0)  # 0.4 s for what is in flight, 0.4 s for the rest

    def test_kept_where_almost_all_of_it_is_here(self) -> None:
        assert self.answer(350_000, 8e6, 0.6) == "keep"

    def test_kept_where_the_round_trip_would_waste_as_much(self) -> None:
        assert self.answer(150_000, 8e6, 0.6) == Replace(0)
        assert self.answer(150_000, 8e6, 0.6, rtt_s=0.2) == "keep"

    def test_kept_where_nothing_helps(self) -> None:
        assert self.answer(0, 8e6, -0.1) == "keep"

    def test_at_its_lowest_level_already_or_with_the_next_one_under_way(self) -> None:
        policy = registry.make("kvstream+replace")
        for flying in (
            (InFlight(3, 0, 100_000, 0, 0.9),),
            (InFlight(3, TEXT, 400, 0, 0.9),),
            (InFlight(3, 2, 400_000, 0, 0.9), InFlight(4, 2, 400_000, 0, 0.95)),
        ):
            assert policy.progress(after(4, 8e6, 0.6, in_flight=flying)) == "keep"  # type: ignore[attr-defined]


class TestKVStreamInGeneral:
    @given(obs=in_session(), low=st.floats(0.01, 0.99), high=st.floats(0.01, 0.99))
    def test_a_higher_target_is_never_more_aggressive(self, obs: Observation, low: float, high: float) -> None:
        low, high = sorted((low, high))
        assert choose("kvstream", obs, target=high).level <= choose("kvstream", obs, target=low).level  # type: ignore[operator]

    @given(obs=in_session(texts=True), low=st.floats(0.01, 0.99), high=st.floats(0.01, 0.99))
    def test_nor_does_it_trust_compute_more(self, obs: Observation, low: float, high: float) -> None:
        low, high = sorted((low, high))
        texts = [choose("kvstream", obs, target=target).reason["texts"] for target in (low, high)]
        assert texts[1] <= texts[0]

    @given(obs=in_session(texts=True), target=st.floats(0.01, 0.99))
    def test_any_moment_of_a_session_has_a_choice(self, obs: Observation, target: float) -> None:
        choice = choose("kvstream", obs, target=target)
        assert choice.chunk in obs.remaining
        assert choice.level == TEXT or 0 <= int(choice.level) < obs.n_levels
        assert all(math.isfinite(value) for value in choice.reason.values())
        assert 0.0 <= choice.reason.get("in_time", 0.0) <= 1.0 + 1e-9

    @given(obs=in_session(), sizes=st.lists(st.integers(1, 10**9), min_size=2, max_size=6), more_s=st.floats(0.0, 2.0))
    def test_the_chance_falls_with_bytes_and_rises_with_time(
        self, obs: Observation, sizes: list[int], more_s: float
    ) -> None:
        cases = KVStream()._cases(obs)
        later = replace(obs, deadline_s=obs.deadline_s + more_s)
        plans = [Plan(3 * size, ((2, size),), obs.compute_backlog_s, 0.01) for size in sorted(sizes)]
        chances = [in_time(plan, (2e7, 0.5), cases, obs, 0) for plan in plans]
        assert chances == sorted(chances, reverse=True)
        for plan, chance in zip(plans, chances, strict=True):
            assert in_time(plan, (2e7, 0.5), KVStream()._cases(later), later, 0) >= chance
            assert in_time(plan, (4e7, 0.5), cases, obs, 0) >= chance
            assert in_time(plan._replace(compute_s=plan.compute_s + more_s), (2e7, 0.5), cases, obs, 0) <= chance

    @given(
        counts=st.lists(st.tuples(st.integers(1, 20), st.integers(1_000, 1_000_000)), min_size=1, max_size=2),
        rtt_s=st.sampled_from([0.0, 0.01, 0.1]),
        left_s=st.floats(0.01, 3.0),
    )
    def test_the_throughput_needed_is_the_least(
        self, counts: list[tuple[int, int]], rtt_s: float, left_s: float
    ) -> None:
        """At it, chunks that take a round trip or their bytes' time, whichever is longer, just fill the time left."""
        chunks = tuple(sorted(((n, float(size)) for n, size in counts), key=lambda one: one[1]))
        plan = Plan(int(sum(n * size for n, size in chunks)), chunks, 0.0, 0.0)
        bps = needed_bps(plan, Case(1.0, 0, left_s, 1.0), rtt_s, 0)
        if bps == math.inf:
            assert sum(n for n, _ in chunks) * rtt_s >= left_s * 0.999
        else:
            assert sum(n * max(rtt_s, 8.0 * size / bps) for n, size in chunks) == pytest.approx(left_s, rel=1e-6)


class TestClairvoyant:
    forecast = Forecast(Trace("t", np.array([1.0]), np.array([8e6])), 0.05, 2)

    def test_what_is_in_flight_is_placed_on_the_true_link(self) -> None:
        flying = (InFlight(0, 1, 200_000, 100_000, 0.1), InFlight(1, 0, 100_000, 0, 0.2))
        obs = observation(4, done=2, in_flight=flying, now_s=0.25)
        assert [end for _, _, end in flights(self.forecast, obs)] == pytest.approx([0.35, 0.45])
        assert begin_s(self.forecast, obs) == pytest.approx(0.45)
        assert begin_s(self.forecast, observation(4, now_s=0.25)) == pytest.approx(0.30)

    def test_the_line_ahead_has_text_as_its_last_option(self) -> None:
        line = line_ahead(self.forecast, observation(4, recompute=0.2, decode=0.01))
        assert line.sizes_bytes[0] == (100_000.0, 200_000.0, 400_000.0, 400.0)
        assert line.compute_s[0] == (0.01, 0.01, 0.01, 0.2)
        assert line.distortion[0] == pytest.approx((0.025, 0.0125, 0.00625, 0.0))
        assert line.start_s == pytest.approx(0.15)
        assert len(line_ahead(self.forecast, observation(4)).sizes_bytes[0]) == 3

    def test_it_takes_the_best_plan_that_fits_and_else_the_soonest(self) -> None:
        def first(deadline_s: float) -> Any:
            policy = Oracle(margin=0.0)
            policy.foresee(self.forecast)
            return policy.choose(observation(2, deadline_s=deadline_s, now_s=0.0)).level

        # one begins at 0.05 s; 100, 200 and 400 kB take 0.1, 0.2 and 0.4 s each
        assert first(0.86) == 2
        assert first(0.46) in (1, 2)
        assert first(0.26) == 0
        assert first(0.1) == 0

    def test_it_plans_ahead_of_the_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Later choices follow the plan without another search; of a session that is late, there is one."""
        obs = observation(2, deadline_s=0.86, now_s=0.0)
        ahead, searched = Oracle(), []
        ahead.foresee(replace(self.forecast, first=obs))
        search = oracle.least_distortion

        def counted(*given: Any, **more: Any) -> Any:
            searched.append(more["widest"])
            return search(*given, **more)

        monkeypatch.setattr(oracle, "least_distortion", counted)
        once = Oracle()
        once.foresee(self.forecast)
        assert (ahead.choose(obs).level, searched) == (once.choose(obs).level, [oracle.WIDEST])
        later = observation(2, done=1, transfers=arrived(1, 16e6), deadline_s=0.86, now_s=0.6)
        ahead.choose(later)
        assert searched[1] == oracle.BEAM

    def test_a_margin_is_a_fraction(self) -> None:
        with pytest.raises(PolicyError, match="margin"):
            Oracle(margin=1.0)
