"""`kvstream report`: a run's report, written anew."""

from __future__ import annotations

import argparse
import json

from kvstream.testbed.commands.arguments import output_file


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = subparsers.add_parser("report", help="rewrite a run's report, and export its sessions")
    report.add_argument("run_folder", metavar="RUN", help="folder of a run, such as runs/main")
    report.add_argument("--baseline", metavar="SCHEME", help="compare with this scheme (default: the experiment's)")
    report.add_argument("--csv", metavar="FILE", type=output_file, help="also write the sessions as CSV")
    report.add_argument("--json", action="store_true", help="print the summary as JSON")
    report.set_defaults(run=report_command)


def report_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.commands.concluding import conclude
    from kvstream.testbed.results.folder import Run, write_csv

    run = Run.open(args.run_folder)
    summary = conclude(run, quiet=args.json, baseline=args.baseline or "")
    if args.csv:
        write_csv(run.rows(), args.csv)
    if args.json:
        print(json.dumps(summary, indent=1))
    elif args.csv:
        print(args.csv)
    return 0
