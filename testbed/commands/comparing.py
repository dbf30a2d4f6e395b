"""`kvstream compare`, `merge`: two runs side by side, and shards of one run joined."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

from kvstream.testbed.commands.concluding import judge_run, tell, threshold_arguments
from kvstream.testbed.errors import SpecError


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = subparsers.add_parser(
        "merge",
        help="join the shards of a run, and conclude it",
        description="Join shards of one run that have folders of their own, or conclude one that shares a folder.",
    )
    merge.add_argument("runs", nargs="+", metavar="RUN", help="folders of the shards, or the folder that they share")
    merge.add_argument("--into", metavar="DIR", help="folder of the joined run; needed for several")
    threshold_arguments(merge)
    merge.set_defaults(run=merge_command)

    compare = subparsers.add_parser(
        "compare",
        help="compare two runs on the same units",
        description="Compare two runs on the same units: what changed for each scheme, with paired intervals.",
    )
    compare.add_argument("runs", nargs=2, metavar="RUN", help="folders of runs; the first is the baseline")
    threshold_arguments(compare, "mine.violations worse by 0.05")
    compare.set_defaults(run=compare_command)


def merge_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.results import merge, thresholds
    from kvstream.testbed.results.folder import Run

    begun_s = time.monotonic()
    runs = [Run.open(path) for path in args.runs]
    thresholds.check([thresholds.parse(text) for text in args.fail_if], runs[0].compared, runs[0].traces)
    if len(runs) > 1 and not args.into:
        raise SpecError("several runs are joined in a folder of their own: name it with --into")
    return judge_run(args, merge.merge(runs, Path(args.into)) if args.into else runs[0], begun_s)


def compare_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.results import compare, margins

    begun_s = time.monotonic()
    limits = [margins.parse(text) for text in args.fail_if]
    result = compare.compare(*args.runs)
    after = {name.rpartition("@")[0]: name for name in result.get("changes", {})}
    # units are spread evenly over the traces
    margins.check(limits, after, [str(i % result["traces"]) for i in range(result["units"]["counted"])])
    judged = [margins.judge(limit, result["changes"][after[limit.scheme]]) for limit in limits]
    if args.json:
        print(json.dumps(result | {"thresholds": [vars(one) for one in judged]}, indent=1))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
        print(compare.text(result, judged, width))
    name = " and ".join(Path(run).resolve().name for run in args.runs)
    return tell(args, name, judged, result, begun_s, compare.changed(result))
