"""What ends a run, whichever command made it: summary, report and table, thresholds, and the exit status."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.testbed.commands.arguments import output_file
from kvstream.testbed.terminal import columns, say

if TYPE_CHECKING:
    from kvstream.testbed.results.folder import Run
    from kvstream.testbed.results.thresholds import Judged


def threshold_arguments(parser: argparse.ArgumentParser, example: str = "cachegen.violations>0.1") -> None:
    """`--fail-if` and the files that CI systems show."""
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="THRESHOLD",
        help=f"exit 1 if it holds: {example!r}; repeatable",
    )
    parser.add_argument("--junit", metavar="FILE", type=output_file, help="write the thresholds as JUnit XML")
    parser.add_argument(
        "--markdown", metavar="FILE", type=output_file, help="append the result as Markdown, for a job's summary"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def judge_run(args: argparse.Namespace, run: Run, begun_s: float) -> int:
    """Summarise and report, and the exit status by thresholds and invalid units."""
    from kvstream.testbed.results import ci_files, thresholds

    summary = conclude(run, quiet=args.json)
    end(run, summary)
    if args.json:
        print(json.dumps(summary, indent=1))
    judged = [thresholds.judge(thresholds.parse(text), summary) for text in args.fail_if]
    status = tell(args, run.manifest["experiment"]["name"], judged, summary, begun_s)
    if problem := ci_files.too_invalid(summary):
        say(f"kvstream: {problem}; stop other programs here and run again", error=True)
        return 3
    return status


def tell(
    args: argparse.Namespace,
    name: str,
    judged: Sequence[Judged],
    summary: dict[str, Any],
    begun_s: float,
    first: Sequence[str] = (),
) -> int:
    """Print violated thresholds and write the files that were asked for; returns 1 if a threshold is violated."""
    from kvstream.testbed.results import ci_files

    for one in judged:
        if one.is_violated:
            say(f"kvstream: threshold violated: {one}", error=True)
    if args.junit:
        ci_files.write_junit(args.junit, name, judged, summary, time.monotonic() - begun_s)
    if args.markdown:
        ci_files.append_markdown(args.markdown, name, judged, summary, first)
    return int(any(one.is_violated for one in judged))


def end(run: Run, summary: dict[str, Any]) -> None:
    """Tell the run's followers that it has ended."""
    from kvstream.testbed import events

    if (run.path / events.FILE_NAME).is_file():
        events.append(run.path / events.FILE_NAME, events.RunEnd(summary["verdict"]))


def conclude(run: Run, *, quiet: bool, baseline: str = "") -> dict[str, Any]:
    """Rebuild the files of a run from its cells, write summary and report, print the table.

    `baseline` is the scheme that the others are compared with (default: the experiment's).
    """
    from kvstream.testbed import report
    from kvstream.testbed.results import by_setting, summary
    from kvstream.testbed.results.folder import write_whole

    manifest, schemes = run.manifest, run.compared
    with run.locked():
        rows = run.rebuild()
        result = summary.of_run(rows, manifest, baseline)
        result["simulated"] = summary.beside(run, baseline)
        apart = manifest["experiment"].get("workload") or manifest["experiment"].get("repetitions", 1) > 1
        result["settings"] = by_setting.by_setting(rows, schemes) if apart else []
        write_whole(run.path / "summary.json", result)
        page = report.write(run, baseline)
    if not quiet:
        _show(result, page, is_quick=bool(manifest["experiment"].get("is_quick")))
    return result


def _show(result: dict[str, Any], page: Path, *, is_quick: bool) -> None:
    """The summary on the terminal, or in a pipe."""
    from kvstream.testbed.results import by_setting, table

    width, beside = columns(), result["simulated"]
    print()
    if width:
        from rich.console import Console

        console = Console()
        console.print(table.table(result, console.width))
    else:
        print(table.text(result))
    if is_quick:
        say("--quick: one context and one deadline, preview only")
    if result["deadlines"]:
        print(f"\n{table.by_deadline(result, width)}")
    if beside:
        say(f"\nThe same in the simulator, {beside['units']['counted']:,} units:\n")
        print(table.text(beside, width or math.inf))
        print(f"\n{table.by_deadline(beside, width)}")
    if result["settings"]:
        print(f"\n{by_setting.text(result['settings'], width)}")
    say(f"\n{result['verdict']}\nReport: {page}")
