from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.summary import of_run, summarise
from kvstream.testbed.results.table import by_deadline, table, text
from kvstream.testbed.results.verdict import MIN_UNITS
from kvstream.testbed.results.words import nats, percent
from tests.testbed.made_run import make_run


def row(scheme: str, unit: int, met: bool, **other: Any) -> dict[str, Any]:
    return {
        "context": "docs",
        "unit_id": f"{unit:03d}",
        "scheme": scheme,
        "policy": scheme,
        "codec": "cachegen",
        "clairvoyant": scheme == "oracle",
        "model": "m",
        "backend": "mininet",
        "trace": f"trace-{unit % 4}",
        "status": "ok",
        "why": "",
        "deadline_s": 1.0,
        "ttft_s": 0.5 if met else 1.5,
        "met": met,
        "distortion": 0.01,
        "measured_kl": 0.02,
        "answers_right": 3,
        "answers": 4,
        "bytes": 1_000_000,
        "wasted_bytes": 0,
        "policy_faults": 0,
        "regret": 0.0 if met else None,
        "fidelity": {"ok": True},
        "repeats": 0,
    } | other


def test_an_invalid_session_excludes_its_unit_for_every_scheme() -> None:
    rows = [row("a", 0, True), row("b", 0, True), row("a", 1, True), row("b", 1, False, status="invalid", why="late")]
    summary = summarise(rows)
    assert [entry["n"] for entry in summary["schemes"]] == [1, 1]
    assert summary["units"] == {
        "seen": 2, "counted": 1, "invalid": 1, "invalid_reason": "late", "incomplete": 0, "feasible": 1,
    }  # fmt: skip
    assert summary["invalid_units"] == ["001"]


def test_what_is_there_of_an_unfinished_run_is_said() -> None:
    """Units that some scheme has not run are not done, and only traces with a session count."""
    planned = [{"unit_id": f"{k:03d}", "trace": f"trace-{k % 4}", "link": "", "offset_s": 0.0} for k in range(12)]
    manifest = {"experiment": {}, "schemes": [{"name": "a"}, {"name": "b"}], "units": planned}
    rows = [row(scheme, unit, True) for unit in (0, 4, 5) for scheme in "ab"] + [row("a", 8, True)]
    summary = of_run(rows, manifest)
    assert summary["unfinished"] == "3 of 12 units so far, on 2 of 4 traces"
    assert "not finished: 3 of 12 units so far, on 2 of 4 traces" in text(summary)
    assert of_run([row(s, unit, True) for unit in range(12) for s in "ab"], manifest)["unfinished"] == ""
    for unit in planned:
        unit["trace"], unit["link"] = "trace-0", f"loss={int(unit['unit_id']) % 2}%"
    assert of_run(rows, manifest)["unfinished"] == "3 of 12 units so far, on 2 of 2 links"


def test_answers_are_read_beside_those_of_the_exact_cache() -> None:
    manifest = {"experiment": {}, "schemes": [{"name": "a"}], "exact_answers": {"docs": 3, "code": 4, "prose": 4}}
    rows = [row("a", 0, True, context="docs"), row("a", 1, True, context="code", answers_right=0)]
    summary = of_run(rows, manifest)
    assert summary["exact_answers"] == {"docs": [3, 4], "code": [4, 4]}
    assert "the exact cache gives 3/4 on docs, 4/4 on code" in text(summary)
    assert "the exact cache gives all right ones" in text(of_run(rows[1:], manifest))
    assert "the exact cache" not in text(of_run(rows, manifest | {"exact_answers": {}}))


def test_incomplete_units_are_counted_separately() -> None:
    summary = summarise([row("a", 0, True), row("b", 0, True), row("a", 1, True)])
    assert [entry["n"] for entry in summary["schemes"]] == [1, 1]
    assert summary["units"]["incomplete"] == 1


def test_a_failed_session_counts_as_an_slo_violation_with_infinite_ttft() -> None:
    rows = [row("a", unit, True) for unit in range(9)]
    rows.append(row("a", 9, False, status="failed", ttft_s=None, distortion=None, answers=None, answers_right=None))
    entry = summarise(rows)["schemes"][0]
    assert (entry["n"], entry["failed"], entry["met"]) == (10, 1, 9)
    assert entry["ttft_p50_s"] == 0.5
    assert entry["ttft_p99_s"] is None
    assert entry["distortion"] == pytest.approx(0.01)


def test_the_verdict_names_the_ratio_and_its_significance() -> None:
    rows = [row("bold", unit, unit < 10, distortion=0.001) for unit in range(20)]
    rows += [row("careful", unit, unit < 18, distortion=0.004) for unit in range(20)]
    verdict = summarise(rows, baseline="bold")["verdict"]
    assert verdict.startswith("careful meets the deadline 1.8x as often as bold (90 % vs 50 % of 20 units)")
    assert ", at 4x higher distortion (0.004 vs 0.001 nats)." in verdict
    assert "is statistically significant" in verdict


def test_an_insignificant_difference_is_not_called_a_win() -> None:
    rows = [row("good", unit, unit != 3, distortion=0.001) for unit in range(10)]
    rows += [row("lowest", unit, True, distortion=0.02) for unit in range(10)]
    summary = summarise(rows, baseline="lowest")
    verdict = summary["verdict"]
    assert verdict.startswith("lowest meets the deadline in 100 % of 10 units, good in 90 %")
    assert ", at 20x higher distortion (0.02 vs 0.001 nats)." in verdict
    assert "is not statistically significant" in verdict
    assert "Which of them is the better one at the target of 95 % is not shown" in verdict
    assert summary["standing"] == {"pareto": ["lowest", "good"], "dominated": {}, "keeping": [], "winner": None}


def test_a_clairvoyant_scheme_never_makes_the_headline() -> None:
    rows = [row("oracle", unit, True) for unit in range(10)] + [row("mine", unit, unit < 2) for unit in range(10)]
    rows += [row("base", unit, unit < 1) for unit in range(10)]
    summary = summarise(rows, baseline="base")
    assert summary["verdict"].startswith("mine meets the deadline in 20 % of 10 units, base in 10 %")
    assert "oracle" not in summary["standing"]["pareto"]
    assert "The oracle meets it in 100 %" in summary["verdict"]


def test_simulated_and_synthetic_results_say_so() -> None:
    rows = [row("a", unit, True, backend="simulator", model="synthetic-mistral-7b") for unit in range(3)]
    assert summarise(rows)["verdict"].startswith("Synthetic caches, timing only. Simulated: a meets")


def test_a_deadline_out_of_reach() -> None:
    rows = [row("a", unit, False) for unit in range(4)] + [row("b", unit, False, ttft_s=1.2) for unit in range(4)]
    assert summarise(rows)["verdict"] == (
        "The deadline is out of reach: no scheme meets it in any of 4 units. "
        "The fastest, b, has a median TTFT of 1.2 s."
    )


def test_the_most_frequent_reason_whatever_its_numbers() -> None:
    whys = ["drops 3 > 0", "waited 0.2 s", "waited 0.35 s"]
    rows = [row("a", unit, False, status="invalid", why=why) for unit, why in enumerate(whys)]
    assert summarise(rows)["units"]["invalid_reason"] == "waited 0.2 s"


def test_nothing_to_compare() -> None:
    assert summarise([])["verdict"].startswith("No unit")
    assert "scheme" in text(summarise([]))


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown baseline 'c'; choose from a"):
        summarise([row("a", 0, True)], baseline="c")


def test_the_table_is_at_most_100_columns_wide_and_marks_the_oracle(tmp_path: Path) -> None:
    run = make_run(tmp_path, contexts=("docs",), spoil=False)
    summary = summarise(run.rows(), [scheme["name"] for scheme in run.manifest["schemes"]])
    lines = text(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 1 + 7 + 3
    assert lines[8] == "4 units on 4 traces"
    assert next(line for line in lines if line.startswith("oracle")).startswith("oracle *")

    assert "…" not in shown(summary, 100)


def test_too_few_traces_for_intervals_are_told() -> None:
    summary = summarise([row("a", unit, True, trace=f"trace-{unit % 3}") for unit in range(9)])
    assert "9 units; 3 traces are too few for intervals, which need at least 4" in text(summary)
    assert " 100% " in text(summary)
    assert summary["verdict"] == (
        "a meets the deadline in 100 % of 9 units (3 traces are too few for intervals, which need at least 4)."
    )


def shown(summary: dict[str, Any], width: int) -> str:
    """The table as a terminal of this width has it."""
    out = io.StringIO()
    Console(file=out, width=width).print(table(summary, width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("width", "gone"),
    [(100, ""), (80, "bytes, fidelity"), (66, "bytes, fidelity, regret"), (60, "bytes, fidelity, regret, answers")],
)
def test_a_narrow_terminal_omits_columns_and_says_so(tmp_path: Path, width: int, gone: str) -> None:
    run = make_run(tmp_path, contexts=("docs",), spoil=False)
    summary = summarise(run.rows(), [scheme["name"] for scheme in run.manifest["schemes"]])
    lines = shown(summary, width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert not any("…" in line for line in lines)
    assert all(heading not in lines[0] for heading in gone.split(", ") if gone)
    assert all(heading in lines[0] for heading in ("scheme", "deadline met", "TTFT p50/p95", "distortion"))
    assert (f"omitted on this narrow terminal: {gone}" in " ".join(map(str.rstrip, lines))) == bool(gone)


def test_an_empty_column_is_omitted_first() -> None:
    rows = [row("fast", unit, True) | {"answers": None, "answers_right": None} for unit in range(9)]
    whole, narrow = text(summarise(rows)), text(summarise(rows), 80)
    assert "answers" in whole.splitlines()[0]
    assert "answers" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_a_long_name_is_wrapped_and_no_number_cropped() -> None:
    rows = [row("a-name-" * 9, unit, True, trace=f"trace-{unit}") for unit in range(9)]
    lines = shown(summarise(rows), 80)
    assert "…" not in lines
    assert "100% [70–100]" in lines


@pytest.mark.parametrize("n", [1, MIN_UNITS - 1, MIN_UNITS])
def test_few_units_are_called_too_few(n: int) -> None:
    rows = [row("fast", unit, True) for unit in range(n)] + [row("slow", unit, False) for unit in range(n)]
    verdict = summarise(rows, baseline="slow")["verdict"]
    assert "about as often" not in verdict
    assert (f"fast meets the deadline in {n} of {n} unit" in verdict) == (n < MIN_UNITS)
    assert ("too few to compare rates" in verdict) == (n < MIN_UNITS)
    assert ("is statistically significant" in verdict) == (n >= MIN_UNITS)


def made(name: str, share: float, distortion: float, units: int, seed: int, traces: int = 0) -> list[dict[str, Any]]:
    """Sessions of a scheme that meets this share of deadlines, each on a trace of its own unless there are fewer."""
    draw = random.Random(f"{name}/{seed}")
    return [
        row(name, unit, draw.random() < share, distortion=distortion * draw.uniform(0.5, 1.5))
        | {"trace": f"trace-{unit % (traces or units)}"}
        for unit in range(units)
    ]


def test_the_worse_of_two_schemes_is_never_named_at_small_n() -> None:
    """A verdict that takes what is not significantly worse for equal names the bold one in most of these runs."""
    winners = []
    for seed in range(100):
        rows = made("careful", 0.96, 0.02, 9, seed) + made("bold", 0.75, 0.005, 9, seed)
        summary = summarise(rows, baseline="bold")
        winners.append(summary["standing"]["winner"])
        assert "is the best" not in summary["verdict"]
    assert set(winners) == {None}


def test_with_enough_units_the_scheme_that_keeps_the_target_wins() -> None:
    winners = []
    for seed in range(40):
        rows = made("careful", 0.97, 0.02, 600, seed, 60) + made("bold", 0.85, 0.005, 600, seed, 60)
        rows += made("safe", 0.99, 0.2, 600, seed, 60)
        winners.append(summarise(rows, baseline="bold")["standing"]["winner"])
    assert winners.count("careful") >= 35
    assert set(winners) <= {"careful", None}


def test_a_scheme_that_is_worse_in_both_leaves_the_pareto_set() -> None:
    rows = made("quick", 0.7, 0.004, 400, 1, 40) + made("good", 0.9, 0.02, 400, 1, 40)
    rows += made("poor", 0.6, 0.03, 400, 1, 40)
    summary = summarise(rows)
    assert summary["standing"]["pareto"] == ["good", "quick"]
    assert summary["standing"]["dominated"] == {"poor": "good"}
    assert summary["verdict"].startswith("No single winner: 2 of 3 schemes form the Pareto set. Deadlines met")
    assert "None is shown to keep the target of 95 % of the feasible units" in summary["verdict"]


def test_the_target_counts_feasible_units_only() -> None:
    rows = made("careful", 1.0, 0.02, 300, 1) + made("bold", 0.8, 0.005, 300, 1)
    rows += made("safe", 1.0, 0.3, 300, 1)
    for unit in range(0, 300, 3):
        for one in rows[unit::300]:
            one |= {"met": False, "oracle_distortion": None}
    summary = summarise(rows)
    assert (summary["units"]["counted"], summary["units"]["feasible"]) == (300, 200)
    entry = summary["schemes"][0]
    assert (entry["met_rate"], entry["feasible_n"], entry["feasible"]) == (pytest.approx(2 / 3), 200, 1.0)
    assert summary["standing"]["winner"] == "careful"
    assert "it meets the deadline in 100 % of 200 feasible units" in summary["verdict"]
    assert summarise(rows, target=1.0)["standing"]["winner"] == "careful"


def test_distortion_over_all_sessions_and_over_those_that_met() -> None:
    rows = [row("a", unit, unit < 6, distortion=0.01 if unit < 6 else 0.05) for unit in range(8)]
    entry = summarise(rows)["schemes"][0]
    assert (entry["distortion"], entry["distortion_met"]) == (pytest.approx(0.02), pytest.approx(0.01))
    assert "0.02/0.01" in text(summarise(rows))
    assert "of all sessions / of those that met the deadline" in text(summarise(rows))


@pytest.mark.parametrize("invalid", [0, 1, 2])
def test_too_many_invalid_units_allow_no_verdict(invalid: int) -> None:
    rows = [row("a", unit, True, status="invalid" if unit < invalid else "ok", why="late") for unit in range(10)]
    verdict = summarise(rows)["verdict"]
    assert verdict.startswith("No verdict: 2 of 10 units are invalid, more than 10 %") == (invalid == 2)
    assert summarise(rows, max_invalid=0.2)["verdict"].startswith("a meets")


def test_a_share_that_is_not_quite_all_does_not_read_like_all() -> None:
    assert [percent(share) for share in (0.0, 0.001, 0.5, 0.996, 1.0)] == ["0 %", "<1 %", "50 %", ">99 %", "100 %"]


def test_rounding_residue_is_printed_as_zero() -> None:
    assert [nats(value) for value in (-1.55e-17, 0.0, 3e-5, -0.012, None)] == ["0", "0", "3e-05", "-0.012", "-"]
    assert nats(0.5, "+") == "+0.5"
    rows = [row("a", unit, True, regret=-1.55e-17) for unit in range(3)]
    assert "  0 (3)" in text(summarise(rows))


def test_reference_lines_exclude_no_unit_and_stand_apart() -> None:
    rows = [row(scheme, unit, True) for scheme in ("a", "b") for unit in range(4)]
    rows += [row("text", 1, False, reference=True), row("text", 2, False, reference=True, status="invalid")]
    summary = summarise(rows, ("a", "b"))
    assert summary["units"]["counted"] == 4
    assert [entry["scheme"] for entry in summary["schemes"]] == ["a", "b"]
    [line] = summary["references"]
    assert (line["scheme"], line["n"], line["met"], line["versus"], line["reference"]) == ("text", 1, 0, None, True)
    assert "text †" in text(summary)
    assert "† reference line" in text(summary)
    assert summarise(rows)["schemes"] == summary["schemes"], "also without a list of schemes"


def test_each_deadline_has_its_statistics() -> None:
    rows = [
        row(
            scheme, unit, met=unit % 2 == 0 or scheme == "a", deadline_s=0.5 + unit % 2, distortion=0.1 * (1 + unit % 2)
        )
        for scheme in ("a", "b")
        for unit in range(6)
    ]
    short, long = summarise(rows)["deadlines"]
    assert [(part["deadline_s"], part["n"]) for part in (short, long)] == [(0.5, 3), (1.5, 3)]
    assert [(one["scheme"], one["met"]) for one in short["schemes"]] == [("a", 3), ("b", 3)]
    assert [(one["scheme"], one["met"]) for one in long["schemes"]] == [("a", 3), ("b", 0)]
    assert long["schemes"][0]["distortion"] == pytest.approx(0.2)
    assert by_deadline(summarise(rows)).splitlines()[2].split() == ["b", "0.0%,", "0.1", "100.0%,", "0.2"]
    assert summarise([row("a", 0, True)])["deadlines"] == []
    assert by_deadline(summarise([row("a", 0, True)])) == ""
