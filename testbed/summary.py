"""What a run says: per scheme numbers with intervals, paired differences to a baseline, and a verdict in words.

Rows are those of `sessions.jsonl`. Comparisons are paired: a unit counts only if every scheme has a session on it and
none of them is invalid; the others are counted, by reason. A failed session counts as a missed deadline with an
infinite TTFT, so that failing never looks like being fast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from testbed import stats
from testbed.errors import SpecError

if TYPE_CHECKING:
    from rich.table import Table

Json: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]

FEWEST: Final = 6
"""With fewer units McNemar's exact test stays above 5 % even if every one of them differs (2 / 2^5)."""
ROUNDING: Final = 1e-9
"""Nats: smaller differences come from the order in which numbers were added up."""
SYNTHETIC: Final = "Synthetic caches, timing only. "


def summarise(
    rows: Sequence[Row], schemes: Sequence[str] = (), baseline: str = "", pairs: Mapping[str, str] | None = None
) -> Json:
    """The content of `summary.json`.

    `schemes` gives the order of the result and which schemes a unit must have to be complete; by default those of
    the rows, in their order. `baseline` is the scheme that the others are compared with, by default the first.
    With `pairs` the verdict is about the best of their keys, beside what each is paired with (a scheme after and before
    a change). Raises SpecError if the baseline is none of the schemes.
    """
    names = list(dict.fromkeys(schemes or [row["scheme"] for row in rows]))
    baseline = baseline or (names[0] if names else "")
    if names and baseline not in names:
        raise SpecError(f"baseline {baseline!r} is none of the schemes; there are {', '.join(names)}")
    units: dict[str, dict[str, Row]] = {}
    for row in rows:
        units.setdefault(row["unit_id"], {})[row["scheme"]] = row
    complete = {key: cells for key, cells in units.items() if all(name in cells for name in names)}
    invalid = sorted(key for key, cells in units.items() if any(row["status"] == "invalid" for row in cells.values()))
    counted = [cells for key, cells in complete.items() if key not in set(invalid)]
    summary: Json = {
        "backend": ", ".join(sorted({row["backend"] for row in rows})),
        "models": sorted({row["model"] for row in rows}),
        "units": {
            "seen": len(units),
            "counted": len(counted),
            "invalid": len(invalid),
            "invalid_reason": _commonest([row["why"] for row in rows if row["status"] == "invalid"]),
            "incomplete": sum(key not in complete and key not in set(invalid) for key in units),
        },
        "invalid_units": invalid,
        "traces": len({cells[names[0]]["trace"] for cells in counted}),
        "baseline": baseline,
        "schemes": [
            _scheme(
                name, [cells[name] for cells in counted], [cells[name] for cells in units.values() if name in cells]
            )
            | {"versus": None if name == baseline else versus(counted, name, baseline)}
            for name in names
        ],
    }
    if pairs:
        summary["pairs"] = {name: versus(counted, name, base) for name, base in pairs.items()}
    summary["verdict"] = verdict(summary, counted, pairs or {})
    return summary


def _scheme(name: str, rows: Sequence[Row], every: Sequence[Row]) -> Json:
    """Statistics over `rows`, the counted sessions; `every` holds the ones left out as well."""
    met = sum(bool(row["met"]) for row in rows)
    low, high = stats.wilson(met, len(rows))
    ttft = stats.ttft_quantiles([math.inf if row["ttft_s"] is None else row["ttft_s"] for row in rows])
    known = [row for row in rows if row["distortion"] is not None]
    distortion = stats.clustered_mean([row["distortion"] for row in known], [row["trace"] for row in known])
    judged = [row["fidelity"]["ok"] for row in every if "ok" in row["fidelity"]]
    return {
        "scheme": name,
        "policy": every[0]["policy"] if every else "",
        "codec": every[0]["codec"] if every else "",
        "clairvoyant": bool(every and every[0]["clairvoyant"]),
        "n": len(rows),
        "failed": sum(row["status"] == "failed" for row in rows),
        "met": met,
        "met_rate": met / len(rows) if rows else None,
        "met_low": low,
        "met_high": high,
        "ttft_p50_s": _finite(ttft["p50"]),
        "ttft_p90_s": _finite(ttft["p90"]),
        "ttft_p95_s": _finite(ttft["p95"]),
        "ttft_p99_s": _finite(ttft["p99"]),
        "distortion": distortion.value,
        "distortion_low": distortion.low,
        "distortion_high": distortion.high,
        "measured_kl": _mean(_known(rows, "measured_kl")),
        "answers_right": sum(_known(rows, "answers_right")),
        "answers": sum(_known(rows, "answers")),
        "bytes": _mean(_known(rows, "bytes")),
        "wasted_bytes": _mean(_known(rows, "wasted_bytes")),
        "regret": _mean(_known(rows, "regret")),
        "regret_n": len(_known(rows, "regret")),
        "policy_faults": sum(_known(rows, "policy_faults")),
        "fidelity_ok": sum(judged),
        "fidelity_n": len(judged),
        "repeats": sum(_known(every, "repeats")),
    }


def versus(counted: Sequence[Mapping[str, Row]], name: str, baseline: str) -> Json:
    """Paired differences `name` minus `baseline` over units; intervals by a bootstrap clustered by trace."""
    both = [cells for cells in counted if None not in (cells[name]["distortion"], cells[baseline]["distortion"])]
    met = _paired(counted, name, baseline, "met")
    distortion = _paired(both, name, baseline, "distortion")
    moves = [int(cells[name]["met"]) - int(cells[baseline]["met"]) for cells in counted]
    return {
        "baseline": baseline,
        "n": len(counted),
        "met": met.value,
        "met_low": met.low,
        "met_high": met.high,
        "met_p": stats.mcnemar(gained=moves.count(1), lost=moves.count(-1)),
        "distortion": distortion.value,
        "distortion_low": distortion.low,
        "distortion_high": distortion.high,
    }


def _paired(units: Sequence[Mapping[str, Row]], name: str, baseline: str, key: str) -> stats.Mean:
    return stats.paired_difference(
        [float(cells[name][key]) for cells in units],
        [float(cells[baseline][key]) for cells in units],
        [cells[name]["trace"] for cells in units],
    )


def is_more_than_chance(difference: Json) -> bool:
    """Whether a difference in deadlines met (`versus`) is more than chance explains, at 5 %.

    McNemar's test takes units for independent; units on one trace are not, so where there are several traces, the
    interval that is clustered by trace must exclude 0 as well.
    """
    low, high = difference["met_low"], difference["met_high"]
    return difference["met_p"] < 0.05 and (low is None or low > 0.0 or high < 0.0)


def headline(summary: Json, counted: Sequence[Mapping[str, Row]], among: Collection[str] = ()) -> str:
    """The scheme that the verdict is about: of those (`among` these, if any) that meet the deadline as often as the
    best one, within what chance explains, the one with the least distortion. Clairvoyant schemes cannot win.
    """
    open_to_all = [
        entry
        for entry in summary["schemes"]
        if not entry["clairvoyant"] and entry["n"] and (not among or entry["scheme"] in among)
    ]
    if not open_to_all:
        return ""
    best = max(open_to_all, key=lambda entry: (entry["met"], -_or_inf(entry["distortion"])))
    level = [
        entry
        for entry in open_to_all
        if entry["met"] == best["met"]
        # few units cannot tell any two schemes apart: the rate must lie within the best one's interval as well
        or (
            entry["met_rate"] >= best["met_low"]
            and not is_more_than_chance(versus(counted, entry["scheme"], best["scheme"]))
        )
    ]
    return str(min(level, key=lambda entry: (_or_inf(entry["distortion"]), -entry["met"]))["scheme"])


def verdict(summary: Json, counted: Sequence[Mapping[str, Row]], pairs: Mapping[str, str]) -> str:
    """The run in words; it names what was compared, how large the difference is, and whether chance explains it."""
    entries = {entry["scheme"]: entry for entry in summary["schemes"]}
    name = headline(summary, counted, pairs) or headline(summary, counted)
    if not name:
        return "No unit has a valid session of every scheme: nothing can be compared."
    if not any(entry["met"] for entry in entries.values()):
        hopeless = _place(summary) + _hopeless(list(entries.values()))
        return hopeless[0].upper() + hopeless[1:]
    ours, base = entries[name], entries[pairs.get(name, summary["baseline"])]
    rate = f"{_percent(ours['met_rate'])} of {many(ours['n'], 'unit')}"
    if name == base["scheme"]:
        rivals = [entry for key, entry in entries.items() if key != name and not entry["clairvoyant"]]
        if not rivals:
            return _place(summary) + f"{name} meets the deadline in {rate} ({_interval(ours)})."
        base = max(rivals, key=lambda entry: (entry["met"], -_or_inf(entry["distortion"])))
    difference = versus(counted, name, base["scheme"])
    apart = is_more_than_chance(difference)
    words = [f"{name} meets the deadline {_often(ours, base, apart)}{_at_distortion(ours, base)}"]
    if ours["n"] < FEWEST:
        words.append(f"{many(ours['n'], 'unit')} {'is' if ours['n'] == 1 else 'are'} too few to tell how often")
    elif ours["met"] != base["met"]:
        points = 100 * (ours["met_rate"] - base["met_rate"])
        likely = "more than chance explains" if apart else "within what chance explains"
        words.append(f"The difference of {points:+.0f} points is {likely} (McNemar p = {difference['met_p']:.2g})")
    bound = next((entry for entry in summary["schemes"] if entry["policy"].partition(",")[0] == "oracle"), None)
    if bound is not None and bound["scheme"] != name and bound["distortion"] is not None:
        words.append(f"The oracle meets it in {_percent(bound['met_rate'])}, at {bound['distortion']:.2g} nats")
    return _place(summary) + ". ".join(words) + "."


def _place(summary: Json) -> str:
    place = "Simulated: " if "simulator" in summary["backend"] else ""
    if any(model.startswith("synthetic") for model in summary["models"]):
        place = SYNTHETIC + place
    return place


def _hopeless(entries: Sequence[Json]) -> str:
    words = f"no scheme meets the deadline in any of {many(entries[0]['n'], 'unit')}: it is out of reach here."
    arriving = [entry for entry in entries if entry["ttft_p50_s"] is not None]
    if arriving:
        fastest = min(arriving, key=lambda entry: entry["ttft_p50_s"])
        words += f" The fastest, {fastest['scheme']}, takes {fastest['ttft_p50_s']:.3g} s at the median."
    return words


def _often(ours: Json, base: Json, apart: bool) -> str:
    rates = f"({_percent(ours['met_rate'])} against {_percent(base['met_rate'])} of {many(ours['n'], 'unit')})"
    if ours["met"] == base["met"]:
        return f"as often as {base['scheme']} {rates}"
    if ours["n"] < FEWEST:
        return f"in {ours['met']} of {many(ours['n'], 'unit')}, {base['scheme']} in {base['met']}"
    if not apart:
        return f"about as often as {base['scheme']} {rates}"
    if base["met"] == 0:
        return f"in {_percent(ours['met_rate'])} of {many(ours['n'], 'unit')}, {base['scheme']} never"
    if ours["met"] < base["met"]:
        return f"less often than {base['scheme']} {rates}"
    return f"{stats.times(ours['met'] / base['met'])} as often as {base['scheme']} {rates}"


def _at_distortion(ours: Json, base: Json) -> str:
    """Ours against the baseline's, as a factor; empty where either is unknown."""
    if ours["distortion"] is None or base["distortion"] is None:
        return ""
    both = f"({nats(ours['distortion'])} against {nats(base['distortion'])} nats)"
    if not ours["distortion"] or not base["distortion"]:
        same = ours["distortion"] == base["distortion"]
        return f", at {'the same' if same else 'no' if not ours['distortion'] else 'a'} distortion {both}"
    ratio = ours["distortion"] / base["distortion"]
    if 0.95 < ratio < 1.05:
        return f", at the same distortion {both}"
    how = f"{stats.times(ratio)} its" if ratio > 1 else f"{stats.times(1 / ratio)} less"
    return f", at {how} distortion {both}"


# --- the table

HEADINGS = ("scheme", "n", "deadline met", "TTFT p50/p95", "distortion", "answers", "bytes", "regret", "fidelity")
SPARED: Final = (("bytes", "fidelity"), ("regret",), ("answers",))
"""Columns that a narrow terminal does without, the first group first."""
GAP: Final = 2
"""Blanks between columns."""


def cells(summary: Json) -> list[list[str]]:
    """The table's cells, one row a scheme, in the order of HEADINGS."""
    return [
        [
            entry["scheme"] + (" *" if entry["clairvoyant"] else ""),
            str(entry["n"]),
            f"{entry['met_rate']:.0%} [{_interval(entry)}]" if entry["n"] else "-",
            f"{_seconds(entry['ttft_p50_s'])}/{_seconds(entry['ttft_p95_s'])} s" if entry["n"] else "-",
            nats(entry["distortion"]),
            f"{entry['answers_right']}/{entry['answers']}" if entry["answers"] else "-",
            bytes_words(entry["bytes"]),
            f"{nats(entry['regret'])} ({entry['regret_n']})" if entry["regret_n"] else "-",
            f"{entry['fidelity_ok']}/{entry['fidelity_n']}" if entry["fidelity_n"] else "-",
        ]
        for entry in summary["schemes"]
    ]


def notes(summary: Json) -> list[str]:
    """What must be said under the table; empty when there is nothing."""
    units, lines = summary["units"], []
    if any(entry["clairvoyant"] for entry in summary["schemes"]):
        lines.append("* is told the future of the link")
    if units["invalid"]:
        seen = many(units["seen"], "unit")
        lines.append(f"{units['invalid']} of {seen} left out: the link was not what the trace says")
        lines.append(f"  most often: {units['invalid_reason']}")
    if units["incomplete"]:
        lines.append(f"{units['incomplete']} of {many(units['seen'], 'unit')} left out: not every scheme has run yet")
    for entry in summary["schemes"]:
        if entry["failed"]:
            lines.append(f"{entry['scheme']}: {many(entry['failed'], 'session')} failed (counted as missed)")
        if entry["policy_faults"]:
            lines.append(
                f"{entry['scheme']}: {many(entry['policy_faults'], 'choice')} replaced, the policy's could not be used "
                "(chunks.jsonl has each fault)"
            )
    return lines


def table(summary: Json, width: int = 100) -> Table:
    """For a terminal of `width` columns: where they do not all fit, the ones that one misses least are left out."""
    from rich.table import Table

    columns, remarks = _fitting(summary, width)
    view = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold", caption_justify="left")
    view.add_column("scheme", overflow="fold")
    for column in columns[1:]:
        view.add_column(column[0], justify="right", no_wrap=True)
    for row in list(zip(*columns, strict=True))[1:]:
        view.add_row(*row)
    view.caption = "\n".join(remarks) or None
    return view


def text(summary: Json, width: float = math.inf) -> str:
    """The same table in plain text: aligned columns, no colour, never wrapped; by default whole, for a pipe."""
    columns, remarks = _fitting(summary, width)
    sizes = [max(map(len, column)) for column in columns]
    aligned = [
        (" " * GAP).join(cell.ljust(size) if i == 0 else cell.rjust(size) for i, (cell, size) in enumerate(pairs))
        for pairs in (list(zip(line, sizes, strict=True)) for line in zip(*columns, strict=True))
    ]
    return "\n".join([line.rstrip() for line in aligned] + remarks)


def _fitting(summary: Json, width: float) -> tuple[list[tuple[str, ...]], list[str]]:
    """The table's columns, heading first, that fit, and what must be said under them."""
    columns = dict(zip(HEADINGS, zip(HEADINGS, *cells(summary), strict=True), strict=True))
    empty = tuple(heading for heading, column in columns.items() if set(column[1:]) == {"-"})
    gone: list[str] = []
    for group in (empty, *SPARED):
        if sum(max(map(len, column)) for column in columns.values()) + GAP * (len(columns) - 1) <= width:
            break
        gone += (heading for heading in group if heading in columns and group is not empty)
        columns = {heading: column for heading, column in columns.items() if heading not in group}
    narrow = [f"left out on this narrow terminal: {', '.join(gone)}; the report has them"] if gone else []
    return list(columns.values()), [*notes(summary), *narrow]


def _commonest(reasons: Sequence[str]) -> str:
    """One of the reasons given most often, numbers apart."""
    kinds = [re.sub(r"[0-9.]+", "", reason) for reason in reasons]
    return reasons[kinds.index(max(kinds, key=kinds.count))] if reasons else ""


def _known(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _finite(value: float | None) -> float | None:
    """None for the quantile that is a failed session."""
    return None if value is None or math.isinf(value) else value


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _percent(rate: float) -> str:
    return f"{rate * 100:.0f} %"


def _interval(entry: Json) -> str:
    return f"{entry['met_low'] * 100:.0f}–{entry['met_high'] * 100:.0f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value >= 1 else f"{value:.2f}"


def nats(value: float | None, sign: str = "") -> str:
    """A distortion or a difference of two for people; what rounding left of nothing is nothing."""
    if value is None:
        return "-"
    return "0" if abs(value) < ROUNDING else f"{value:{sign}.2g}" if abs(value) >= 1e-4 else f"{value:{sign}.0e}"


def many(count: int, noun: str) -> str:
    """`1 unit`, `9 units`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_words(value: float | None) -> str:
    """A size for people: `2.98 MB`."""
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
