from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed.errors import SpecError
from testbed.summary import FEWEST, nats, summarise, table, text
from tests.testbed.made_run import make_run


def row(scheme: str, unit: int, met: bool, **other: Any) -> dict[str, Any]:
    return {
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


def test_an_invalid_session_takes_its_unit_from_every_scheme() -> None:
    rows = [row("a", 0, True), row("b", 0, True), row("a", 1, True), row("b", 1, False, status="invalid", why="late")]
    summary = summarise(rows)
    assert [entry["n"] for entry in summary["schemes"]] == [1, 1]
    assert summary["units"] == {"seen": 2, "counted": 1, "invalid": 1, "invalid_reason": "late", "incomplete": 0}
    assert summary["invalid_units"] == ["001"]


def test_a_unit_that_not_every_scheme_has_run_is_counted_apart() -> None:
    summary = summarise([row("a", 0, True), row("b", 0, True), row("a", 1, True)])
    assert [entry["n"] for entry in summary["schemes"]] == [1, 1]
    assert summary["units"]["incomplete"] == 1


def test_a_failed_session_is_a_missed_deadline_that_never_arrives() -> None:
    rows = [row("a", unit, True) for unit in range(9)]
    rows.append(row("a", 9, False, status="failed", ttft_s=None, distortion=None, answers=None, answers_right=None))
    entry = summarise(rows)["schemes"][0]
    assert (entry["n"], entry["failed"], entry["met"]) == (10, 1, 9)
    assert entry["ttft_p50_s"] == 0.5
    assert entry["ttft_p99_s"] is None
    assert entry["distortion"] == pytest.approx(0.01)


def test_the_verdict_names_the_ratio_and_whether_chance_explains_it() -> None:
    rows = [row("bold", unit, unit < 10, distortion=0.001) for unit in range(20)]
    rows += [row("careful", unit, unit < 18, distortion=0.004) for unit in range(20)]
    verdict = summarise(rows, baseline="bold")["verdict"]
    assert verdict.startswith("careful meets the deadline 1.8x as often as bold (90 % against 50 % of 20 units)")
    assert ", at 4x its distortion (0.004 against 0.001 nats)." in verdict
    assert "more than chance explains" in verdict


def test_what_chance_explains_is_not_called_a_win() -> None:
    rows = [row("good", unit, unit != 3, distortion=0.001) for unit in range(10)]
    rows += [row("lowest", unit, True, distortion=0.02) for unit in range(10)]
    verdict = summarise(rows, baseline="lowest")["verdict"]
    assert verdict.startswith("good meets the deadline about as often as lowest (90 % against 100 % of 10 units)")
    assert ", at 20x less distortion (0.001 against 0.02 nats)." in verdict
    assert "within what chance explains" in verdict


def test_a_clairvoyant_scheme_never_makes_the_headline() -> None:
    rows = [row("oracle", unit, True) for unit in range(10)] + [row("mine", unit, unit < 2) for unit in range(10)]
    rows += [row("base", unit, unit < 1) for unit in range(10)]
    summary = summarise(rows, baseline="base")
    assert summary["verdict"].startswith("mine meets the deadline about as often as base (20 % against 10 %")
    assert "The oracle meets it in 100 %" in summary["verdict"]


def test_simulated_and_synthetic_results_say_so() -> None:
    rows = [row("a", unit, True, backend="simulator", model="synthetic-mistral-7b") for unit in range(3)]
    assert summarise(rows)["verdict"].startswith("Synthetic caches, timing only. Simulated: a meets")


def test_a_deadline_out_of_reach_is_called_so() -> None:
    rows = [row("a", unit, False) for unit in range(4)] + [row("b", unit, False, ttft_s=1.2) for unit in range(4)]
    assert summarise(rows)["verdict"] == (
        "No scheme meets the deadline in any of 4 units: it is out of reach here. "
        "The fastest, b, takes 1.2 s at the median."
    )


def test_the_commonest_reason_is_told_whatever_its_numbers() -> None:
    whys = ["drops 3 > 0", "waited 0.2 s", "waited 0.35 s"]
    rows = [row("a", unit, False, status="invalid", why=why) for unit, why in enumerate(whys)]
    assert summarise(rows)["units"]["invalid_reason"] == "waited 0.2 s"


def test_nothing_to_compare_is_said() -> None:
    assert summarise([])["verdict"].startswith("No unit")
    assert "scheme" in text(summarise([]))


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(SpecError, match="baseline 'c' is none of the schemes; there are a"):
        summarise([row("a", 0, True)], baseline="c")


def test_the_table_is_at_most_100_columns_wide_and_marks_the_oracle(tmp_path: Path) -> None:
    run = make_run(tmp_path, contexts=("docs",), spoil=False)
    summary = summarise(run.rows(), [scheme["name"] for scheme in run.manifest["schemes"]])
    lines = text(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 1 + 7 + 1
    assert next(line for line in lines if line.startswith("oracle")).startswith("oracle *")

    assert "…" not in shown(summary, 100)


def shown(summary: dict[str, Any], width: int) -> str:
    """The table as a terminal of this width has it."""
    out = io.StringIO()
    Console(file=out, width=width).print(table(summary, width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("width", "gone"),
    [(100, ""), (80, "bytes, fidelity"), (66, "bytes, fidelity, regret"), (60, "bytes, fidelity, regret, answers")],
)
def test_a_narrow_terminal_does_without_some_columns_and_says_so(tmp_path: Path, width: int, gone: str) -> None:
    run = make_run(tmp_path, contexts=("docs",), spoil=False)
    summary = summarise(run.rows(), [scheme["name"] for scheme in run.manifest["schemes"]])
    lines = shown(summary, width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert not any("…" in line for line in lines)
    assert all(heading not in lines[0] for heading in gone.split(", ") if gone)
    assert all(heading in lines[0] for heading in ("scheme", "deadline met", "TTFT p50/p95", "distortion"))
    assert (f"left out on this narrow terminal: {gone}" in " ".join(map(str.rstrip, lines))) == bool(gone)


def test_a_column_that_says_nothing_is_left_out_first() -> None:
    rows = [row("fast", unit, True) | {"answers": None, "answers_right": None} for unit in range(9)]
    whole, narrow = text(summarise(rows)), text(summarise(rows), 80)
    assert "answers" in whole.splitlines()[0]
    assert "answers" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_a_long_name_is_folded_and_no_number_cropped() -> None:
    lines = shown(summarise([row("a-name-" * 9, unit, True) for unit in range(9)]), 80)
    assert "…" not in lines
    assert "100% [70–100]" in lines


@pytest.mark.parametrize("n", [1, FEWEST - 1, FEWEST])
def test_few_units_are_called_too_few(n: int) -> None:
    rows = [row("fast", unit, True) for unit in range(n)] + [row("slow", unit, False) for unit in range(n)]
    verdict = summarise(rows, baseline="slow")["verdict"]
    assert "about as often" not in verdict
    assert (f"fast meets the deadline in {n} of {n} unit" in verdict) == (n < FEWEST)
    assert ("too few to tell how often" in verdict) == (n < FEWEST)
    assert ("more than chance explains" in verdict) == (n >= FEWEST)


def test_what_rounding_left_is_nothing() -> None:
    assert [nats(value) for value in (-1.55e-17, 0.0, 3e-5, -0.012, None)] == ["0", "0", "3e-05", "-0.012", "-"]
    assert nats(0.5, "+") == "+0.5"
    rows = [row("a", unit, True, regret=-1.55e-17) for unit in range(3)]
    assert "  0 (3)" in text(summarise(rows))
