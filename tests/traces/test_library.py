"""The library: files that match their recipes, stories, and families in two halves."""

from __future__ import annotations

import hashlib

import pytest

from kvstream.traces import library
from kvstream.traces.errors import TraceError
from kvstream.traces.generators import GENERATORS
from kvstream.traces.library.recipes import RECIPES, make
from kvstream.traces.resolve import open_trace


def test_names_are_the_recipes_and_no_generators():
    assert library.names() == sorted(RECIPES)
    assert not set(library.names()) & set(GENERATORS)
    assert {"steady", "step-down-up", "uniform-hold", "lte-walk", "dropout", "wifi"} <= set(library.names())
    assert len(library.TEACHING) == 6
    assert set(library.TEACHING) <= set(library.names())


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_is_what_its_recipe_makes(name):
    stored, made = library.load(name), make(name)
    assert stored == made
    assert (stored.name, stored.story, stored.provenance) == (name, made.story, made.provenance)
    assert len(stored.story.split()) >= 10
    assert stored.kind == "capacity"
    assert 4e6 <= stored.mean_bps <= 50e6
    assert "Apache-2.0" in stored.provenance[0].licence


def test_something_happens_in_the_first_second_of_every_lesson_but_the_first():
    steps = {name: len(library.load(name).changes(0.0, 1.0)) for name in library.TEACHING}
    assert steps.pop("lab-steady") == 1
    assert min(steps.values()) > 1


@pytest.mark.parametrize("name", library.TEACHING)
def test_lessons_differ_within_the_first_second(name):
    trace = library.load(name)
    others = [library.load(other) for other in library.TEACHING if other != name]
    assert all(max(abs(trace.bits_by(t) - other.bits_by(t)) for t in (0.2, 0.4, 0.8)) > 0.4e6 for other in others)


def test_families_have_two_halves_that_share_nothing():
    assert len(library.families("tune")) == 6
    everything = []
    for name in library.families("tune"):
        tune, held_out = library.family(name, "tune"), library.family(name, "held-out")
        assert len(tune) == len(held_out) == library.HALF
        assert not set(tune) & set(held_out)
        everything += tune + held_out
    assert len(set(everything)) == len(everything) == 96
    assert len({trace.name for trace in everything}) == 96
    for trace in everything:
        assert 3e6 < trace.mean_bps < 100e6
        assert open_trace(trace.name) == trace
        assert library.load(trace.name) == trace


def test_unseen_families_are_others():
    assert not set(library.families("unseen")) & set(library.families("tune"))
    assert sorted(library.families()) == sorted(library.families("unseen") + library.families("held-out"))
    everything = [trace for name in library.families("unseen") for trace in library.family(name, "unseen")]
    assert len(set(everything)) == len(everything) == 64
    for trace in everything:
        assert 3e6 < trace.mean_bps < 150e6
        assert open_trace(trace.name) == trace


def test_a_member_can_be_made_from_its_provenance():
    for name in library.families():
        trace = library.load(f"family/{name}-009")
        assert open_trace(trace.provenance[0].source).with_end(trace.end) == trace


def test_families_do_not_drift():
    """Held-out results are comparable across versions only while a name means the same link."""
    digest = hashlib.sha256()
    for name in library.families("tune"):
        for half in ("tune", "held-out"):
            for trace in library.family(name, half):
                digest.update(bytes.fromhex(trace.sha256))
    assert digest.hexdigest() == "7baba0ea8d357697b4eee43b9f20b072b3ed2800874ee3c04ae6995d0a2a06f2"
    for name in library.families("unseen"):
        for trace in library.family(name, "unseen"):
            digest.update(bytes.fromhex(trace.sha256))
    assert digest.hexdigest() == "d71f687467ad63f7b044411e37639feb267cd2a637a729171a94a70d2ec06005"


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "family/markov",
        "family/markov-16",
        "family/markov-016",
        "family/none-000",
        "family/-000",
        "../steady",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(TraceError, match=r"choose from|families are") as caught:
        library.load(name)
    assert "\n" not in str(caught.value)


def test_unknown_families_and_halves_are_refused():
    with pytest.raises(TraceError, match="no trace family 'x' with a split 'tune'; choose from markov"):
        library.family("x", "tune")
    with pytest.raises(TraceError, match="no trace family 'ramp' with a split 'tune'"):
        library.family("ramp", "tune")
    with pytest.raises(TraceError, match="choose from tune, held-out, unseen"):
        library.family("markov", "test")
