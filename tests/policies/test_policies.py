"""Every policy on situations worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from policies import registry
from policies.api import TEXT, Choice, Forecast, InFlight, Observation, Replace
from policies.artifact import ArtifactOracle
from policies.bola import Bola
from policies.errors import PolicyError
from policies.future import begin_s, flights
from policies.measures import Pace, named_level, spend
from policies.oracle import Oracle, line_ahead
from tests.policies.observations import arrived, observation
from traces.trace import Trace


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

    def test_its_oracle_is_told_the_rate_of_the_chunk_itself(self) -> None:
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

    def test_it_buys_what_saves_most_a_byte_and_keeps_the_rest_for_later(self) -> None:
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
        assert choose("hicache", observation(recompute=0.1, now_s=0.19), most_s=0.2).level == 2
        assert choose("hicache", observation(recompute=0.1, now_s=0.21), most_s=0.2).level == TEXT


class TestKVStream:
    def test_text_alone_when_all_of_it_fits(self) -> None:
        assert choose("kvstream", observation(recompute=0.16, compute_backlog_s=0.1)).level == TEXT

    def test_compute_is_fed_from_the_front_and_the_link_from_the_back(self) -> None:
        idle = observation(8, recompute=0.3, rtt_s=0.02)
        assert choose("kvstream", idle) == Choice(TEXT, chunk=0, reason={"text_room": 2})
        busy = observation(8, recompute=0.3, rtt_s=0.02, compute_backlog_s=0.3)
        assert choose("kvstream", busy).chunk == 7
        fast = observation(8, done=1, transfers=arrived(1, 80e6), recompute=0.15, compute_backlog_s=0.1)
        assert choose("kvstream", fast).chunk == 7  # a chunk takes 0.04 s at most
        slow = observation(8, done=1, transfers=arrived(1, 16e6), recompute=0.15, compute_backlog_s=0.1)
        assert choose("kvstream", slow).level == TEXT  # and here 0.2 s

    def test_no_text_that_could_not_be_recomputed_in_time(self) -> None:
        assert choose("kvstream", observation(8, recompute=0.3, now_s=0.75, rtt_s=0.02)).level != TEXT

    def test_more_time_raises_the_level(self) -> None:
        levels = [int(choose("kvstream", after(3, 16e6, x, rtt_s=0.0)).level) for x in np.linspace(0.05, 3.0, 30)]
        assert (levels[0], levels[-1]) == (0, 2)
        # a few scenarios stand for all throughputs, so now and then a level is one off
        assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(levels))
        assert levels[8:] == sorted(levels[8:])

    def test_a_dearer_miss_and_a_wider_spread_are_more_careful(self) -> None:
        obs = after(3, 16e6, 0.9, rtt_s=0.0)
        careless = choose("kvstream", obs, miss=1.0, spread=0.1).level
        careful = choose("kvstream", obs, miss=50.0, spread=1.0).level
        assert careful < careless  # type: ignore[operator]

    def test_chunks_go_in_order_where_nothing_can_be_recomputed(self) -> None:
        assert choose("kvstream", after(3, 16e6, 0.5)).chunk == 3


class TestClairvoyant:
    forecast = Forecast(Trace("t", np.array([1.0]), np.array([8e6])), 0.05, 2)

    def test_what_is_under_way_is_placed_on_the_true_link(self) -> None:
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

    def test_a_margin_is_a_fraction(self) -> None:
        with pytest.raises(PolicyError, match="margin"):
            Oracle(margin=1.0)
