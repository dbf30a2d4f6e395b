"""What `kvstream advise` says follows from its sizes and times, and is what a session in the simulator takes."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.policies.fixed import Fixed, Text
from kvstream.testbed.cli import main
from kvstream.testbed.errors import SpecError
from kvstream.testbed.run.advise import (
    CHUNK_TOKENS,
    RATES_BPS,
    RAW,
    RECOMPUTE,
    RTT_S,
    Basis,
    Option,
    _ttft,
    advise,
    first_faster,
    last_faster,
    of_workload,
    text,
)
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from tests.testbed.made import constant

TOKENS = 3_000
CODED = Option("coded", "half", 200.0, 0.01, 2e-5)
MADE = Basis(
    model="made",
    compute="paper",
    options=(Option(RAW, "16 bit", 1000.0, 0.0, 1e-6), CODED),
    text_bytes_per_token=2.0,
    forward_s=lambda start, stop: 1e-4 * (stop - start) + 1e-9 * (stop - start) * start,
    prompt_tokens=32,
    about="nothing",
)


def simulated(option: Option, rate_bps: float) -> float:
    """The same session, driven event by event."""
    spans = list(itertools.pairwise([*range(0, TOKENS, CHUNK_TOKENS), TOKENS]))
    sizes = [round(option.bytes_per_token * (stop - start)) for start, stop in spans]
    manifest = Manifest(
        "made", "made", {"codec": "raw"}, None, KVShape(1, 1, 1, "float16"), (LevelInfo("x", 0.0, 1.0),),
        tuple(ChunkInfo(*span, (size,), size) for span, size in zip(spans, sizes, strict=True)),
    )  # fmt: skip
    costs = Costs(
        tuple((option.decode_s_per_token * (stop - start),) for start, stop in spans),
        tuple(MADE.forward_s(*span) for span in spans),
        MADE.forward_s(TOKENS, TOKENS + MADE.prompt_tokens),
    )
    policy = Text() if option.name == RECOMPUTE else Fixed(0)
    settings = SessionSettings(60.0)
    return simulate(manifest, policy, constant(rate_bps), settings, costs=costs, rtt_s=RTT_S, manifest_bytes=0).ttft_s


@pytest.mark.parametrize("rate_bps", [1e6, 3e7, 1e9, 1e11])
@pytest.mark.parametrize("option", [*MADE.options, Option(RECOMPUTE, "text", 2.0, 0.0, 0.0)], ids=lambda x: x.name)
def test_times_are_a_sessions(option: Option, rate_bps: float) -> None:
    took_s = _ttft(MADE, option, TOKENS)(rate_bps)
    # a session may have to wait for an answer where the link is faster than a round trip
    assert took_s <= simulated(option, rate_bps) + 1e-9
    assert took_s == pytest.approx(simulated(option, rate_bps), rel=0.01, abs=7 * RTT_S)


@given(st.floats(1.0, 1e4), st.floats(0.0, 1e-3), st.floats(1.0, 1e4), st.floats(0.0, 1e-3))
def test_at_a_break_even_both_take_as_long(size: float, decode_s: float, other_size: float, other_s: float) -> None:
    one = _ttft(MADE, Option("a", "x", size, 0.0, decode_s), TOKENS)
    other = _ttft(MADE, Option("b", "x", other_size, 0.0, other_s), TOKENS)
    for rate in (first_faster(one, other), last_faster(one, other)):
        if rate is not None and 0.0 < rate < math.inf:
            assert one(rate) == pytest.approx(other(rate), rel=1e-6)
    above, below = first_faster(one, other), last_faster(one, other)
    assert above is None or above == 0.0 or one(RATES_BPS[-1]) < other(RATES_BPS[-1])
    assert (below is None) == (one(RATES_BPS[0]) >= other(RATES_BPS[0]))
    assert (above == 0.0) == (below == math.inf)


def rows(advice: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in advice["options"]}


def test_what_it_says_of_a_slow_and_a_fast_link() -> None:
    slow, fast = (rows(advise(MADE, TOKENS, rate_bps)) for rate_bps in (1e6, 1e12))
    assert slow["coded"]["bytes"] == 200 * TOKENS
    assert slow["recompute"]["ttft_s"] < slow["coded"]["ttft_s"] < slow["raw"]["ttft_s"]
    assert fast["raw"]["ttft_s"] < fast["coded"]["ttft_s"] < fast["recompute"]["ttft_s"]
    # decoding takes 20 us a token, raw 8,000 bits: from 400 Mbit/s on raw is here before what must be decoded
    assert slow["coded"]["faster_than_raw_below_bps"] == pytest.approx(4e8, rel=0.3)
    assert slow["coded"]["faster_than_recompute_above_bps"] < slow["raw"]["faster_than_recompute_above_bps"]
    assert slow["raw"]["faster_than_raw_below_bps"] is None
    assert slow == slow | {name: row | {"ttft_s": slow[name]["ttft_s"]} for name, row in fast.items()}


def test_the_table_names_the_fastest() -> None:
    shown = text(advise(MADE, TOKENS, 1e12)).splitlines()
    assert shown[0] == "made, 3000 tokens, 1e+03 Gbit/s; compute: paper"
    assert shown[-2].startswith("fastest here: raw (16 bit), ")
    assert [line.split()[0] for line in shown[2:5]] == ["raw", "coded", "recompute"]


def test_models_of_the_paper_by_a_data_sheet() -> None:
    a40, h200 = (rows(advise(of_workload(f"mistral-7b{more}"), 9490, 3e9)) for more in ("", ",compute=h200"))
    assert a40["raw"]["bytes"] == 9490 * 131_072
    assert a40["cachegen"]["bytes"] == pytest.approx(9490 * 18.5e3, rel=0.01)  # the paper's 18.5 KB per token
    assert h200["recompute"]["ttft_s"] < a40["recompute"]["ttft_s"] / 5
    assert a40["kvstream"]["ttft_s"] < a40["cachegen"]["ttft_s"] < a40["fp8"]["ttft_s"] < a40["raw"]["ttft_s"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("mistral-7b", "--tokens", "100", "--bandwidth", "0"), "the bandwidth is 0 bit/s"),
        (("mistral-7b", "--tokens", "100", "--bandwidth", "3s"), "3s"),
        (("mistral-7b,compute=tpu", "--tokens", "100", "--bandwidth", "1Gbps"), "unknown compute profile 'tpu'"),
        (("bundled,speed=2", "--tokens", "100", "--bandwidth", "1Gbps"), "has the one setting compute, not speed"),
        (("./nowhere", "--tokens", "100", "--bandwidth", "1Gbps"), "nowhere does not exist"),
        (("bundled", "--tokens", "100", "--bandwidth", "1Gbps", "--device", "tpu"), "--device tpu"),
    ],
)
def test_mistakes_are_said(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str) -> None:
    pytest.importorskip("torch", reason="a model needs torch, from the extra [run]")
    assert main(("advise", *argv)) in (2, 4)
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1


def test_always_and_never_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("advise", "mistral-7b", "--tokens", "9490", "--bandwidth", "3Gbps", "--json")) == 0
    found = rows(json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name)))
    assert found["kvstream"]["faster_than_raw_below_bps"] == "any"
    assert found["raw"]["faster_than_raw_below_bps"] is None


def test_a_bandwidth_must_be_one() -> None:
    with pytest.raises(SpecError, match="the bandwidth is -1 bit/s"):
        advise(MADE, TOKENS, -1.0)


# --- measured on a model


def test_a_model_is_measured() -> None:
    pytest.importorskip("torch", reason="needs torch, from the extra [run]")
    from kvstream.testbed.engine.loading import load_model
    from kvstream.testbed.run import advise_model

    model = load_model()
    basis = advise_model.of_model(model)
    sizes = {(option.name, option.level): option.bytes_per_token for option in basis.options}
    elements = model.kv.elements_per_token
    assert sizes["raw", "16 bit"] == pytest.approx(2 * elements, rel=0.01)
    assert sizes["fp8", "8 bit"] == pytest.approx(elements, rel=0.05)
    cachegen = next(option for option in basis.options if option.name == "cachegen")
    ours = next(option for option in basis.options if option.name == "kvstream")
    assert ours.distortion <= cachegen.distortion  # type: ignore[operator]
    assert ours.bytes_per_token < cachegen.bytes_per_token / 5
    assert all(0.0 < option.decode_s_per_token < 1e-2 for option in basis.options)
    assert basis.text_bytes_per_token == 1.0  # it reads bytes
    assert 0.0 < basis.forward_s(0, 64) <= basis.forward_s(0, 512) <= basis.forward_s(4096, 4608)
    profile = advise_model.workload_of(model, "a40")
    assert profile.parameters == pytest.approx(9.4e6, rel=0.05)
