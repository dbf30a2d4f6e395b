"""A summary as a table on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kvstream.testbed.results.paired import Json
from kvstream.testbed.results.standing import few
from kvstream.testbed.results.words import (
    CLAIRVOYANT,
    REFERENCE,
    bytes_words,
    interval,
    many,
    nats,
    percent,
    seconds,
)
from kvstream.testbed.terminal import GAP, aligned

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS: Final = (
    "scheme",
    "deadline met",
    "TTFT p50/p95",
    "distortion",
    "answers",
    "bytes",
    "regret",
    "fidelity",
)
OPTIONAL: Final = (("bytes", "fidelity"), ("regret",), ("answers",))
"""Columns that a narrow terminal does without, the first group first."""


def cells(summary: Json) -> list[list[str]]:
    """The table's cells, one row per scheme, in the order of HEADINGS."""
    return [
        [
            entry["scheme"] + (" *" if entry["clairvoyant"] else "") + (" †" if entry.get("reference") else ""),
            _share(entry) if entry["n"] else "-",
            f"{seconds(entry['ttft_p50_s'])}/{seconds(entry['ttft_p95_s'])} s" if entry["n"] else "-",
            _distortions(entry),
            f"{entry['answers_right']}/{entry['answers']}" if entry["answers"] else "-",
            bytes_words(entry["bytes"]),
            f"{nats(entry['regret'])} ({entry['regret_n']})" if entry["regret_n"] else "-",
            f"{entry['fidelity_ok']}/{entry['fidelity_n']}" if entry["fidelity_n"] else "-",
        ]
        for entry in (*summary["schemes"], *summary.get("references", ()))
    ]


def _share(entry: Json) -> str:
    """`90% [70–97]`; without brackets where there is no interval."""
    share = percent(entry["met_rate"]).replace(" ", "")
    return f"{share} [{found}]" if (found := interval(entry)) else share


def _distortions(entry: Json) -> str:
    """`0.0074/0.0071`: over all sessions, and over those that met the deadline."""
    if entry["distortion"] is None or "distortion_met" not in entry:  # not in summaries of earlier versions
        return nats(entry["distortion"])
    return f"{nats(entry['distortion'])}/{nats(entry['distortion_met'])}"


def notes(summary: Json) -> list[str]:
    """The lines under the table: the sample, clairvoyant schemes, excluded units, failures, policy faults."""
    units, lines = summary["units"], []
    if summary.get("unfinished"):
        lines.append(f"not finished: {summary['unfinished']}")
    if units["counted"]:
        sample, reason = many(units["counted"], "unit"), few(summary)
        lines.append(f"{sample}; {reason}" if reason else f"{sample} on {many(summary['traces'], 'trace')}")
    if any(entry.get("distortion_met") is not None for entry in summary["schemes"]):
        lines.append("distortion: of all sessions / of those that met the deadline, in nats")
    if exact := summary.get("exact_answers"):
        lines.append(f"answers: right of those asked; the exact cache gives {_exact(exact)}")
    if any(entry["clairvoyant"] for entry in summary["schemes"]):
        lines.append(f"* {CLAIRVOYANT}")
    if references := summary.get("references"):
        lines.append(f"† {REFERENCE} (n = {max(entry['n'] for entry in references)})")
    if units["invalid"]:
        seen = many(units["seen"], "unit")
        lines.append(f"{units['invalid']} of {seen} excluded: the link deviated from its trace")
        lines.append(f"  most frequent reason: {units['invalid_reason']}")
    if units["incomplete"]:
        lines.append(f"{units['incomplete']} of {many(units['seen'], 'unit')} excluded: not every scheme has run yet")
    for entry in summary["schemes"]:
        if entry["failed"]:
            lines.append(f"{entry['scheme']}: {many(entry['failed'], 'session')} failed (counted as SLO violations)")
        if entry["policy_faults"]:
            lines.append(
                f"{entry['scheme']}: {many(entry['policy_faults'], 'invalid choice')} of the policy replaced "
                "(chunks.jsonl lists each fault)"
            )
    return lines


def _exact(answers: Mapping[str, Sequence[int]]) -> str:
    """What the exact cache answers, of each context: `all right ones`, `12/14 on docs, 9/14 on code`."""
    if all(right == asked for right, asked in answers.values()):
        return "all right ones"
    return ", ".join(f"{right}/{asked} on {context}" for context, (right, asked) in answers.items())


def table(summary: Json, width: int = 100) -> Table:
    """For a terminal of `width` columns; where not all columns fit, the least important ones are omitted."""
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
    """The same table in plain text: aligned columns, no colour, never wrapped; by default of any width, for a pipe."""
    columns, remarks = _fitting(summary, width)
    return "\n".join([*aligned(list(zip(*columns, strict=True))), *remarks])


def by_deadline(summary: Json, width: int | None = None) -> str:
    """SLO violations and distortion at each deadline, one row per scheme; empty with a single deadline."""
    if not summary["deadlines"]:
        return ""
    parts = summary["deadlines"]
    lines = [["SLO violations, distortion", *(f"{part['deadline_s']:g} s (n={part['n']})" for part in parts)]]
    for row in zip(*(part["schemes"] for part in parts), strict=True):
        name = row[0]["scheme"] + (" *" if row[0]["clairvoyant"] else "")
        lines.append([name, *(f"{1 - entry['met_rate']:.1%}, {nats(entry['distortion'])}" for entry in row)])
    return "\n".join(aligned(lines, width=width))


def _fitting(summary: Json, width: float) -> tuple[list[tuple[str, ...]], list[str]]:
    """The columns that fit, heading first, and the lines under the table."""
    columns = dict(zip(HEADINGS, zip(HEADINGS, *cells(summary), strict=True), strict=True))
    empty = tuple(heading for heading, column in columns.items() if set(column[1:]) == {"-"})
    omitted: list[str] = []
    for group in (empty, *OPTIONAL):
        if sum(max(map(len, column)) for column in columns.values()) + GAP * (len(columns) - 1) <= width:
            break
        omitted += (heading for heading in group if heading in columns and group is not empty)
        columns = {heading: column for heading, column in columns.items() if heading not in group}
    narrow = [f"omitted on this narrow terminal: {', '.join(omitted)}; the report has them"] if omitted else []
    return list(columns.values()), [*notes(summary), *narrow]
