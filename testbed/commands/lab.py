"""`kvstream lab ...`: start, check, explain, grade, leaderboard."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from kvstream.testbed.commands.arguments import output_file
from kvstream.testbed.terminal import say

SEED_VARIABLE = "KVSTREAM_LAB_SEED"


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    lab = subparsers.add_parser("lab", help="the course: write a policy in one file and see how it performs")
    commands = lab.add_subparsers(dest="lab_command", metavar="COMMAND", required=True)

    start = commands.add_parser("start", help="create a folder to work in")
    start.add_argument("folder", metavar="DIR", type=Path)
    start.add_argument("--json", action="store_true", help="print as JSON")
    start.set_defaults(run=start_command)

    check = commands.add_parser("check", help="run a policy on six links, each with a story")
    _takes_policy(check)
    check.add_argument("--json", action="store_true", help="print as JSON")
    check.set_defaults(run=check_command)

    explain = commands.add_parser("explain", help="explain one choice of a policy")
    explain.add_argument("trace", help="steady, cliff, recovery, sawtooth, outage, burst, or any trace spec")
    explain.add_argument("chunk", type=int, help="which chunk, from 0")
    _takes_policy(explain)
    explain.add_argument("--json", action="store_true", help="print as JSON")
    explain.set_defaults(run=explain_command)

    grade = commands.add_parser("grade", help="grade a policy on unseen links")
    _takes_policy(grade)
    grade.add_argument(
        "--seed-file",
        type=Path,
        help=f"file with the secret seed (default: ${SEED_VARIABLE}, or the public practice seed)",
    )
    grade.add_argument("--name", help="name on the leaderboard (default: the file's name)")
    grade.add_argument("--output", type=output_file, metavar="FILE", help="write the result for lab leaderboard")
    grade.add_argument("--gradescope", type=output_file, metavar="FILE", help="write Gradescope's results.json")
    grade.add_argument("--json", action="store_true", help="print as JSON")
    grade.set_defaults(run=grade_command)

    board = commands.add_parser("leaderboard", help="rank the results of lab grade --output")
    board.add_argument("results", nargs="+", type=Path, metavar="FILE")
    board.add_argument(
        "--figure",
        type=output_file,
        metavar="FILE",
        help="draw the class: violations, distortion and their hull (SVG, PNG)",
    )
    board.add_argument("--json", action="store_true", help="print as JSON")
    board.set_defaults(run=leaderboard_command)


def _takes_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "policy",
        nargs="?",
        default="policy.py",
        help="policy.py, policy.py:Class,key=value, or a built-in policy's name",
    )


def start_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.lab.start import start

    files = start(args.folder)
    if args.json:
        print(json.dumps({"files": [str(file) for file in files]}, indent=1))
        return 0
    for file in files:
        print(file)
    say(f"Start with: cd {args.folder} && kvstream lab check")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from rich.console import Console

    from kvstream.testbed.lab import check, situation, submission

    spec = submission.spec_of(args.policy)
    lab = situation.load()
    tried = check.check(spec, lab)
    if args.json:
        print(json.dumps(check.to_json(tried), indent=1))
    else:
        check.show(args.policy, tried, lab, Console(width=None if sys.stdout.isatty() else 100))
    return 0


def explain_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.lab import explain, situation, submission

    lab = situation.load()
    explanation = explain.explain(submission.spec_of(args.policy), args.trace, args.chunk, lab)
    if args.json:
        print(json.dumps(explain.to_json(explanation), indent=1))
    else:
        say(explain.text(explanation, lab))
    return 0


def grade_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.errors import SpecError
    from kvstream.testbed.host.namespaces import hide_from_peers
    from kvstream.testbed.lab import grade, jail, leaderboard, submission

    if args.seed_file or SEED_VARIABLE in os.environ:
        hide_from_peers()  # the seed is in this process's memory or environment
    seed = os.environ.pop(SEED_VARIABLE, "") or grade.PRACTICE
    if args.seed_file:
        seed = args.seed_file.read_text(encoding="utf-8").strip()
        if not seed:
            raise SpecError(f"{args.seed_file}: the seed is empty; write a secret word into it")
    if seed != grade.PRACTICE and jail.kind() != "namespaces":
        print(
            "kvstream: this machine refuses namespaces, so the submission shares the grader's files and network; "
            "grade strangers' code in a container of its own",
            file=sys.stderr,
        )
    result = grade.grade(submission.spec_of(args.policy), seed)
    if args.output:
        leaderboard.save(result, args.name or Path(args.policy.partition(":")[0]).stem, args.output)
    if args.gradescope:
        args.gradescope.write_text(json.dumps(grade.gradescope(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1)) if args.json else say(grade.text(result))
    return 0


def leaderboard_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.lab import leaderboard

    results = leaderboard.board(args.results)
    if args.figure:
        leaderboard.draw(results, args.figure)
    print(json.dumps(results, indent=1) if args.json else leaderboard.text(results))
    return 0
