"""Generators: the statistics they promise, the same trace every time, and settings they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.traces import generators as g
from kvstream.traces.errors import TraceError
from kvstream.traces.generators import GENERATORS
from kvstream.traces.resolve import open_trace

SEEDED = ("uniform", "markov", "gilbert-elliott", "lognormal", "histogram", "paper-uniform")


@pytest.mark.parametrize("name", GENERATORS)
def test_defaults_give_a_trace_that_its_spec_gives_again(name):
    trace = GENERATORS[name]()
    assert open_trace(trace.provenance[0].source) == trace
    assert trace.kind == "capacity"
    assert np.all(trace.rates_bps == np.round(trace.rates_bps))


@pytest.mark.parametrize("name", SEEDED)
def test_seeds_matter_and_repeat(name):
    make = GENERATORS[name]
    assert make(seed=3) == make(seed=3)
    assert make(seed=3) != make(seed=4)
    with pytest.raises(TraceError, match="seed=-1"):
        make(seed=-1)


@given(
    low=st.floats(1e3, 1e8),
    span=st.floats(1.0, 100.0),
    hold=st.floats(0.01, 2.0),
    length=st.floats(0.1, 20.0),
    seed=st.integers(0, 2**32),
)
def test_bounds_and_length_are_kept(low, span, hold, length, seed):
    high = low * span
    made = [
        g.uniform(low=low, high=high, hold=hold, length=length, seed=seed),
        g.markov(low=low, high=high, hold=hold, length=length, seed=seed),
        g.lognormal(low=low, median=low, high=high, hold=hold, length=length, seed=seed),
        g.gilbert_elliott(good=high, bad=low, good_time=hold, bad_time=hold, length=length, seed=seed),
        g.histogram(edges=(low, high), weights=(1.0,), hold=hold, length=length, seed=seed),
        g.sine(mean=high, amplitude=high - low, hold=hold, length=length),
    ]
    for trace in made:
        assert trace.duration_s == pytest.approx(length)
    for trace in made[:-1]:
        assert low - 1 <= trace.rates_bps.min() <= trace.peak_bps <= high + 1


def test_uniform_is_uniform():
    rates = g.uniform(low=10e6, high=50e6, length=4000.0, seed=1).rates_bps
    assert len(rates) == 20000
    assert rates.mean() == pytest.approx(30e6, rel=0.01)
    assert rates.std() == pytest.approx(40e6 / math.sqrt(12), rel=0.02)
    assert abs(np.corrcoef(rates[1:], rates[:-1])[0, 1]) < 0.03


def test_the_two_forms_of_the_papers_trace_are_different_links():
    by_chunk, by_time = g.paper_uniform(seed=1), g.paper_uniform(per="time", seed=1)
    assert by_chunk.per == "chunk"
    assert by_time.per == "time"
    assert by_chunk != by_time
    assert 0.1e9 <= by_chunk.rates_bps.min() <= by_chunk.peak_bps <= 10e9
    assert by_time.durations_s == pytest.approx(np.full(300, 0.2))


def test_the_record_of_either_form_makes_it_again():
    for per, idle in (("chunk", ("hold", "length")), ("time", ("chunks",))):
        for make in (g.uniform, g.paper_uniform):
            trace = make(per=per, seed=3)
            source = trace.provenance[0].source
            assert open_trace(source) == trace
            assert not any(f"{key}=" in source for key in idle)


def test_the_papers_step_and_constant():
    step = g.paper_step()
    assert [step.rate_at(t) for t in (0.0, 2.5, 4.5, 100.0)] == [2e9, 0.2e9, 1e9, 1e9]
    assert g.paper_constant().rate_at(50.0) == 3e9


def test_markov_stays_and_prefers_neighbours():
    trace = g.markov(low=1e6, high=32e6, states=6, stay=0.7, length=4000.0, seed=5)
    state = np.round(np.log2(trace.rates_bps / 1e6)).astype(int)
    moves = np.abs(np.diff(state))
    assert np.mean(moves == 0) == pytest.approx(0.7, abs=0.02)
    assert np.sum(moves == 1) > np.sum(moves == 2) > np.sum(moves == 3)
    assert set(state.tolist()) == set(range(6))


def test_gilbert_elliott_stays_as_long_as_told():
    trace = g.gilbert_elliott(good=40e6, bad=5e6, good_time=1.0, bad_time=0.25, length=4000.0, seed=2)
    good = trace.durations_s[trace.rates_bps == 40e6]
    bad = trace.durations_s[trace.rates_bps == 5e6]
    assert good.mean() == pytest.approx(1.0, rel=0.05)
    assert bad.mean() == pytest.approx(0.25, rel=0.05)
    assert good.std() == pytest.approx(1.0, rel=0.1)


def test_lognormal_has_its_median_spread_and_memory():
    trace = g.lognormal(median=25e6, sigma=0.5, memory=1.0, hold=0.1, low=1e3, high=1e12, length=20000.0, seed=3)
    x = np.log(trace.rates_bps / 25e6)
    assert np.median(x) == pytest.approx(0.0, abs=0.03)
    assert x.std() == pytest.approx(0.5, rel=0.03)
    assert np.corrcoef(x[10:], x[:-10])[0, 1] == pytest.approx(math.exp(-1.0), abs=0.03)


def test_sine_means_are_exact():
    trace = g.sine(mean=30e6, amplitude=20e6, period=5.0, hold=0.1, length=5.0)
    quarter = 30e6 * 1.25 + 20e6 * 5.0 / (2 * math.pi)
    assert trace.bits_by(1.25 - 0.05) < quarter
    assert trace.bits_by(2.5) == pytest.approx(30e6 * 2.5 + 2 * 20e6 * 5.0 / (2 * math.pi), rel=1e-6)
    assert trace.mean_bps == pytest.approx(30e6, rel=1e-6)


def test_square_step_and_outage_do_what_they_say():
    square = g.square(high=50e6, low=10e6, period=2.0, duty=0.25, length=4.0)
    assert [square.rate_at(t) for t in (0.0, 0.4, 0.6, 2.1)] == [50e6, 50e6, 10e6, 50e6]
    step = g.step(rates=(3.0, 1.0), hold=(0.5, 1.0))
    assert step.changes(0.0, 9.0) == [(0.0, 3.0), (0.5, 1.0)]
    outage = g.outage(rate=40e6, first=1.0, down=0.5, length=10.0)
    assert [outage.rate_at(t) for t in (0.9, 1.2, 1.5, 11.2)] == [40e6, 0.0, 40e6, 0.0]


def test_a_histogram_is_replayed():
    source = g.markov(seed=9, length=600.0)
    edges, weights = g.histogram_of(source, bins=12)
    assert sum(weights) == pytest.approx(600.0)
    replay = g.histogram(edges=edges, weights=weights, length=4000.0, seed=1)
    again = np.array(g.histogram_of(replay, bins=12)[1]) / 4000.0
    assert np.abs(again - np.array(weights) / 600.0).max() < 0.02
    assert sum(g.histogram_of(g.paper_uniform(chunks=10))[1]) == 10


BAD = {
    "constant": [{"rate": -1.0}, {"rate": math.nan}, {"length": 0.0}, {"length": math.inf}],
    "step": [{"rates": ()}, {"hold": (1.0, 2.0)}, {"hold": (0.0,)}, {"rates": (-1.0,)}],
    "square": [{"duty": 0.0}, {"duty": 1.0}, {"period": 0.0}, {"period": 1e-9}],
    "sine": [{"amplitude": 40e6, "mean": 30e6}, {"period": 0.0}, {"hold": 0.0}, {"hold": 1e-9}],
    "uniform": [
        {"low": 2.0, "high": 1.0},
        {"low": -1.0},
        {"hold": 0.0},
        {"per": "chunk", "chunks": 0},
        {"hold": math.nan},
    ],
    "markov": [{"low": 0.0}, {"states": 1}, {"stay": 1.5}, {"low": 2e9}],
    "gilbert-elliott": [{"good_time": 0.0}, {"length": 1e9}, {"bad_time": math.nan}],
    "lognormal": [{"median": 1.0}, {"sigma": -1.0}, {"memory": 0.0}],
    "outage": [{"first": 0.0}, {"down": 100.0}, {"rate": -1.0}],
    "histogram": [{"edges": (1.0,)}, {"edges": (2.0, 1.0), "weights": (1.0,)}, {"weights": (0.0, 0.0, 0.0, 0.0)}],
    "paper-uniform": [{"hold": -1.0, "per": "time"}],
    "paper-step": [{"hold": 0.0}],
    "paper-constant": [{"rate": -1.0}],
}


@pytest.mark.parametrize(("name", "settings"), [(name, each) for name, many in BAD.items() for each in many])
def test_bad_settings_are_refused_in_one_line(name, settings):
    with pytest.raises(TraceError) as caught:
        GENERATORS[name](**settings)
    assert "\n" not in str(caught.value)
