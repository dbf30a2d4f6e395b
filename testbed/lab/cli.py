"""`kvstream lab ...`: start, check, explain, grade, leaderboard."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from testbed.commands.arguments import output_file

SEED_VARIABLE = "KVSTREAM_LAB_SEED"


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    lab = subparsers.add_parser("lab", help="write a policy in one file and see at once how it does")
    commands = lab.add_subparsers(dest="lab_command", metavar="COMMAND", required=True)

    start = commands.add_parser("start", help="write a folder to work in")
    start.add_argument("folder", metavar="DIR", type=Path)
    start.add_argument("--json", action="store_true", help="print as JSON")
    start.set_defaults(run=start_command)

    check = commands.add_parser("check", help="run a policy on six links, each with a story")
    _takes_policy(check)
    check.add_argument("--json", action="store_true", help="print as JSON")
    check.set_defaults(run=check_command)

    explain = commands.add_parser("explain", help="take one choice apart")
    explain.add_argument("trace", help="steady, cliff, recovery, sawtooth, outage, burst, or any trace spec")
    explain.add_argument("chunk", type=int, help="which chunk, from 0")
    _takes_policy(explain)
    explain.add_argument("--json", action="store_true", help="print as JSON")
    explain.set_defaults(run=explain_command)

    grade = commands.add_parser("grade", help="grade a policy on links nobody has seen")
    _takes_policy(grade)
    grade.add_argument(
        "--seed-file", type=Path, help=f"file with the secret seed; else ${SEED_VARIABLE}, else practice"
    )
    grade.add_argument("--name", help="who handed it in, for the leaderboard (default: the file's name)")
    grade.add_argument("--output", type=output_file, metavar="FILE", help="write the result for lab leaderboard")
    grade.add_argument("--gradescope", type=output_file, metavar="FILE", help="write Gradescope's results.json")
    grade.add_argument("--json", action="store_true", help="print as JSON")
    grade.set_defaults(run=grade_command)

    board = commands.add_parser("leaderboard", help="rank results of lab grade --output")
    board.add_argument("results", nargs="+", type=Path, metavar="FILE")
    board.add_argument("--json", action="store_true", help="print as JSON")
    board.set_defaults(run=leaderboard_command)


def _takes_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "policy", nargs="?", default="policy.py", help="policy.py, policy.py:Class,key=value, or a known policy's name"
    )


def start_command(args: argparse.Namespace) -> int:
    from testbed.lab.start import start

    files = start(args.folder)
    if args.json:
        print(json.dumps({"files": [str(file) for file in files]}, indent=1))
        return 0
    for file in files:
        print(file)
    print(f"Begin with: cd {args.folder} && kvstream lab check")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from rich.console import Console

    from testbed.lab import check, situation, submission

    spec = submission.spec_of(args.policy)
    lab = situation.load()
    tried = check.check(spec, lab)
    if args.json:
        print(json.dumps(check.to_json(tried), indent=1))
    else:
        check.show(args.policy, tried, lab, Console(width=None if sys.stdout.isatty() else 100))
    return 0


def explain_command(args: argparse.Namespace) -> int:
    from testbed.lab import explain, situation, submission

    lab = situation.load()
    explanation = explain.explain(submission.spec_of(args.policy), args.trace, args.chunk, lab)
    if args.json:
        print(json.dumps(explain.to_json(explanation), indent=1))
    else:
        print(explain.text(explanation, lab))
    return 0


def grade_command(args: argparse.Namespace) -> int:
    from testbed.lab import grade, submission

    seed = os.environ.pop(SEED_VARIABLE, "") or grade.PRACTICE
    if args.seed_file:
        seed = args.seed_file.read_text(encoding="utf-8").strip()
    result = grade.grade(submission.spec_of(args.policy), seed)
    if args.output:
        grade.save(result, args.name or Path(args.policy.partition(":")[0]).stem, args.output)
    if args.gradescope:
        args.gradescope.write_text(json.dumps(grade.gradescope(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1) if args.json else grade.text(result))
    return 0


def leaderboard_command(args: argparse.Namespace) -> int:
    from testbed.lab import grade

    results = grade.board(args.results)
    print(json.dumps(results, indent=1) if args.json else grade.board_text(results))
    return 0
