"""What a CI system shows of a run: thresholds as JUnit XML, and the result as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

from kvstream.testbed.results import table
from kvstream.testbed.results.paired import Json
from kvstream.testbed.results.thresholds import Judged
from kvstream.testbed.results.words import many


def too_invalid(summary: Json) -> str:
    """Why a run proves nothing: too many invalid units; empty where it does."""
    units = summary["units"]
    if not units["seen"] or units["invalid"] <= summary["max_invalid"] * units["seen"]:
        return ""
    return (
        f"{units['invalid']} of {many(units['seen'], 'unit')} are invalid: the link deviated from its trace "
        f"({units['invalid_reason']})"
    )


def write_junit(path: Path, name: str, judged: Sequence[Judged], summary: Json, seconds: float) -> None:
    """JUnit XML: a first test case for the run itself, which took `seconds` and fails where too many units are invalid,
    then one for each threshold."""
    suite = ElementTree.Element("testsuite", name=f"kvstream {name}", tests=str(1 + len(judged)), errors="0")
    suite.set("failures", str(sum(one.is_violated for one in judged)))
    suite.set("timestamp", (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S"))
    suite.set("time", f"{seconds:.3f}")
    run = ElementTree.SubElement(suite, "testcase", classname=name, name="run", time=f"{seconds:.3f}")
    if problem := too_invalid(summary):
        ElementTree.SubElement(run, "error", message=problem)
        suite.set("errors", "1")
    ElementTree.SubElement(run, "system-out").text = summary["verdict"]
    for one in judged:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=one.threshold, time="0.000")
        if one.is_violated:
            ElementTree.SubElement(case, "failure", message=str(one))
        else:
            ElementTree.SubElement(case, "system-out").text = one.words
    ElementTree.indent(suite)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def append_markdown(path: Path, name: str, judged: Sequence[Judged], summary: Json, first: Sequence[str] = ()) -> None:
    """Add the result to a Markdown file, such as the summary of a job: thresholds, lines that come first, verdict,
    table."""
    parts = [f"## kvstream: {_escaped(name)}"]
    if problem := too_invalid(summary):
        parts.append(f"**Proves nothing:** {_escaped(problem)}.")
    if judged:
        rows = [[f"`{one.threshold}`", "❌ violated" if one.is_violated else "✅ kept", one.words] for one in judged]
        parts.append(_table([["threshold", "", "measured"], *rows]))
    parts += ["\n".join(f"- {_escaped(line)}" for line in first)] if first else []
    parts.append(_escaped(summary["verdict"]))
    parts.append(_table([list(table.HEADINGS), *table.cells(summary)]))
    parts.append("\n".join(f"- {_escaped(note)}" for note in table.notes(summary)))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n\n".join(parts) + "\n\n")


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _escaped(text: str) -> str:
    """Text as text: names of schemes may hold what Markdown takes for formatting."""
    return "".join(f"\\{character}" if character in "*_`<>[]#|" else character for character in text.strip())
