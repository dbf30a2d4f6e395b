"""`kvstream report`: what people look at."""

from __future__ import annotations

import argparse


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = subparsers.add_parser("report", help="write a run's report again, and export its sessions")
    report.add_argument("run_folder", metavar="RUN", help="folder of a run, as in runs/main")
    report.add_argument("--csv", metavar="FILE", help="also write the sessions as CSV")
    report.set_defaults(run=report_command)


def report_command(args: argparse.Namespace) -> int:
    from testbed.commands.experiments import conclude
    from testbed.results import Run, load

    conclude(Run.open(args.run_folder), quiet=False)
    if args.csv:
        load(args.run_folder).to_csv(args.csv, index=False)
        print(args.csv)
    return 0
