"""The table of schemes for other programs and for papers: Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
from typing import Final

from kvstream.testbed.results import table
from kvstream.testbed.results.paired import Json

FIELDS: Final = (
    *("scheme", "policy", "codec", "clairvoyant", "reference", "n", "failed", "met", "met_rate", "met_low", "met_high"),
    *("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "distortion", "distortion_low", "distortion_high", "distortion_met"),
    *("measured_kl", "answers_right", "answers", "bytes", "regret", "regret_n", "fidelity_ok", "fidelity_n"),
)
"""Columns of the CSV file: names and units are those of `summary.json`."""
_LATEX: Final = str.maketrans(
    {"\\": r"\textbackslash{}", "†": r"\dag{}", "–": "--"} | {c: "\\" + c for c in "&%$#_{}"} | {"*": r"$\ast$"}
)


def markdown(summary: Json) -> str:
    """As the terminal shows it."""
    head, *rows = _cells(summary)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def csv_text(summary: Json) -> str:
    """All digits, a column for each number; empty where there is none."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows((*summary["schemes"], *summary["references"]))
    return file.getvalue()


def latex(summary: Json) -> str:
    """A `tabular` with the rules of the package booktabs."""
    head, *rows = ([cell.translate(_LATEX) for cell in line] for line in _cells(summary))
    lines = [" & ".join(line) + r" \\" for line in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", ""])


def _cells(summary: Json) -> list[list[str]]:
    """Headings and rows, without columns that are empty throughout."""
    rows = table.cells(summary)
    kept = [at for at in range(len(table.HEADINGS)) if any(row[at] != "-" for row in rows) or at == 0]
    return [[row[at] for at in kept] for row in (list(table.HEADINGS), *rows)]
