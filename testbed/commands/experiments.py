"""`kvstream run`, `simulate`, `compare`, `doctor`: measure, and say what was measured."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.commands.arguments import output_file
from testbed.errors import MachineError, SpecError

if TYPE_CHECKING:
    from testbed.experiment import Experiment
    from testbed.results import Run


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = subparsers.add_parser(
        "run",
        help="compare schemes over emulated links (the main job without a SPEC)",
        description="Compare schemes over emulated links, or in the simulator where links cannot be emulated.",
    )
    _experiment_arguments(run)
    run.add_argument("--capture", action="store_true", help="record packets at both ends: round trips, retransmissions")
    run.add_argument("--live", action="store_true", help="print the URL of a page that shows the run as it goes on")
    run.set_defaults(run=run_command)

    simulate = subparsers.add_parser("simulate", help="the same comparison in the simulator: no root, no model")
    _experiment_arguments(simulate)
    simulate.set_defaults(run=simulate_command)

    compare = subparsers.add_parser("compare", help="two runs on the same units, side by side")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="folders of runs; the first is the baseline")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    compare.set_defaults(run=compare_command)

    doctor = subparsers.add_parser("doctor", help="what this machine can do, and the line that fixes what it cannot")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(run=doctor_command)


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", nargs="?", metavar="SPEC.toml", help="the experiment; the main job without one")
    parser.add_argument("--name", help="name of the run, and of its folder under runs/")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs are kept (default: runs)")
    parser.add_argument("--model", help="folder or name of a causal language model (default: the bundled one)")
    parser.add_argument("--device", help="where the receiver decodes and runs the model: cpu (default) or cuda")
    parser.add_argument("--workload", help="a synthetic workload: mistral-7b, llama-34b or llama-70b[,compute=h200]")
    parser.add_argument("--context", action="append", help="a shipped context or a JSON file; repeatable")
    parser.add_argument("--trace", action="append", help="a name, file or generator: uniform,low=5Mbps,high=55Mbps")
    parser.add_argument("--policy", action="append", help="a policy to add on --codec: cachegen, ./mine.py:Mine,gain=2")
    parser.add_argument("--codec", help="the codec of all --policy schemes (default: that of the first scheme)")
    parser.add_argument("--deadline", action="append", help="TTFT deadline, as in 800ms; repeatable")
    parser.add_argument("--link", action="append", help="link settings: delay=20ms,loss=0.1%%,queue=50ms,cc=cubic")
    parser.add_argument("--probe", action="store_true", help="probe the link before a session: policies see prior_bps")
    parser.add_argument("--seed", type=int, help="seed of orders, questions and random traces")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on with an earlier run")
    parser.add_argument("--quick", action="store_true", help="one context and deadline: a look, not comparable")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and how long it takes, and stop")
    parser.add_argument(
        "--fail-if", action="append", default=[], metavar="BAR", help="exit 1 if it holds: 'cachegen.violations>0.1'"
    )
    parser.add_argument("--junit", metavar="FILE", type=output_file, help="write the bars as JUnit XML")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run_command(args: argparse.Namespace) -> int:
    from testbed.emulator import sandbox

    if not args.dry_run and not sandbox.inside():
        problem = sandbox.available()
        if problem is None:
            return _in_sandbox(args)
        if args.spec or args.link or args.live:
            raise MachineError(problem)
        out = sys.stderr if args.json else sys.stdout
        print(f"kvstream: no emulated link here ({problem}): this is the SIMULATOR", file=out)
        return simulate_command(args)
    from testbed import runner

    return _carry_out(args, runner.run_emulated)


def _in_sandbox(args: argparse.Namespace) -> int:
    """The same command in namespaces of its own; the dashboard stays outside, where a browser can reach it."""
    from testbed.emulator import sandbox

    argv = [sys.executable, "-m", "testbed.cli", *_own_arguments()]
    if not args.live:
        return sandbox.run(argv)
    from testbed.dashboard.beside import beside

    folder = Path(args.runs) / resolve(args).name
    out = sys.stderr if args.json else sys.stdout
    with beside(folder) as url:
        print(f"Live: {url}", file=out, flush=True)
        status = sandbox.run(argv)
    print(f"To see it again: kvstream dashboard {folder}", file=out)
    return status


def simulate_command(args: argparse.Namespace) -> int:
    from testbed import simulated

    return _carry_out(args, simulated.run_simulated)


def _own_arguments() -> Sequence[str]:
    return sys.argv[1:] or ["run"]


def _carry_out(args: argparse.Namespace, run_units: Any) -> int:
    """Run what is not there yet, then summarise, report and judge."""
    import shutil

    from testbed import bars, inputs
    from testbed.results import Run

    experiment = resolve(args)
    judged = [bars.parse(text) for text in args.fail_if]
    bars.check(judged, [scheme.name for scheme in experiment.schemes])
    inputs.check(experiment)
    folder = Path(args.runs) / experiment.name
    if args.dry_run:
        planned = plan(experiment, folder, emulated=args.command == "run")
        print(json.dumps(planned, indent=1) if args.json else _plan_text(planned))
        return 0
    if args.fresh and folder.exists():
        Run.open(folder)
        shutil.rmtree(folder)
    run = Run(folder)
    quiet = args.json
    try:
        run_units(experiment, run, quiet=quiet)
    except KeyboardInterrupt:
        if run.cells.is_dir() and any(run.cells.glob("*.json")):
            _end(run, conclude(run, quiet=quiet))
        print(f"Finished sessions are kept in {folder}: run it again, without --fresh, and it goes on", file=sys.stderr)
        raise
    summary = conclude(run, quiet=quiet)
    _end(run, summary)
    if args.json:
        print(json.dumps(summary, indent=1))
    missed = [why for bar in judged if (why := bars.missed(bar, summary)) is not None]
    for why in missed:
        print(f"kvstream: bar missed: {why}", file=sys.stderr)
    if args.junit:
        bars.write_junit(args.junit, experiment.name, judged, summary)
    units = summary["units"]
    if units["seen"] and units["invalid"] > experiment.most_invalid * units["seen"]:
        print(f"kvstream: {units['invalid']} of {units['seen']} units are invalid: the link was not what the "
              "traces say; close what else runs on this machine and run again", file=sys.stderr)  # fmt: skip
        return 3
    return 1 if missed else 0


def _end(run: Run, summary: dict[str, Any]) -> None:
    """Tell who follows the run that nothing more comes."""
    from testbed.dashboard import events

    if (run.path / events.FILE_NAME).is_file():
        events.append(run.path / events.FILE_NAME, events.RunEnd(summary["verdict"]))


def conclude(run: Run, *, quiet: bool, baseline: str = "") -> dict[str, Any]:
    """Rebuild the files of a run from its cells, write summary and report, print the table.

    `baseline` is the scheme that the others are compared with, by default the experiment's.
    """
    from testbed import report, settings, summary
    from testbed.results import write_whole

    manifest = run.manifest
    rows = run.rebuild()
    schemes = [scheme["name"] for scheme in manifest["schemes"]]
    result = summary.summarise(rows, schemes, baseline or manifest["experiment"].get("baseline", ""))
    apart = manifest["experiment"].get("workload") or manifest["experiment"].get("repetitions", 1) > 1
    result["settings"] = settings.by_setting(rows, schemes) if apart else []
    write_whole(run.path / "summary.json", result)
    page = report.write(run, baseline)
    if not quiet:
        print()
        if sys.stdout.isatty():
            from rich.console import Console

            console = Console()
            console.print(summary.table(result, console.width))
        else:
            print(summary.text(result))
        if manifest["experiment"].get("is_quick"):
            print("--quick: one context and one deadline, a look and not comparable with other runs")
        if result["settings"]:
            print(f"\n{settings.text(result['settings'])}")
        print(f"\n{result['verdict']}\nReport: {page}")
    return result


def resolve(args: argparse.Namespace) -> Experiment:
    """The experiment of a command line: the file's, or the main job's, with what the options change."""
    from testbed import experiment as experiments
    from testbed import synthetic
    from traces.units import parse_time

    base = experiments.load(args.spec or experiments.MAIN_JOB)
    changes: dict[str, Any] = {}
    if args.workload and not base.workload:
        changes |= {"contexts": (synthetic.CONTEXT,), "traces": (synthetic.TRACE,), "repetitions": 100}
        changes["chunk_tokens"] = synthetic.CHUNK_TOKENS
    for option, field in (
        ("model", "model"),
        ("device", "device"),
        ("workload", "workload"),
        ("seed", "seed"),
        ("name", "name"),
    ):
        if getattr(args, option) is not None:
            changes[field] = getattr(args, option)
    for option, field in (("context", "contexts"), ("trace", "traces"), ("link", "links")):
        if getattr(args, option):
            changes[field] = tuple(getattr(args, option))
    for option in ("capture", "probe"):
        if getattr(args, option, False):
            changes[option] = True
    if args.deadline:
        changes["deadlines_s"] = tuple(parse_time(text) for text in args.deadline)
    if args.policy:
        codec = args.codec or base.schemes[0].codec
        changes["schemes"] = tuple(experiments.Scheme(policy, codec) for policy in args.policy)
        changes["baseline"] = ""
    elif args.codec:
        raise SpecError("--codec goes with --policy; say which policies use it")
    if changes and "name" not in changes:
        changes["name"] = f"{base.name}-custom"
    chosen = experiments.checked(replace(base, **changes))
    return chosen.quick() if args.quick else chosen


def plan(experiment: Experiment, folder: Path, *, emulated: bool) -> dict[str, Any]:
    """What would run. `predicted_s` is what the sessions take over emulated links, None in the simulator."""
    from dataclasses import asdict

    from testbed.experiment import predicted_s

    units = experiment.units()
    return {
        "name": experiment.name,
        "folder": str(folder),
        "sessions": len(units) * len(experiment.schemes),
        "predicted_s": predicted_s(units) * len(experiment.schemes) if emulated else None,
        "schemes": [asdict(scheme) | {"name": scheme.name} for scheme in experiment.schemes],
        "units": [asdict(unit) | {"unit_id": unit.unit_id} for unit in units],
    }


def _plan_text(planned: dict[str, Any]) -> str:
    from testbed.experiment import about

    schemes, units, length_s = planned["schemes"], planned["units"], planned["predicted_s"]
    where = "in the simulator" if length_s is None else f"{about(length_s)} over emulated links"
    lines = [f"{planned['name']}: {len(units)} units x {len(schemes)} schemes = {planned['sessions']} sessions, "
             f"{where}, into {planned['folder']}"]  # fmt: skip
    lines += ["  scheme {name}: policy {policy}, codec {codec}, depth {depth}".format(**scheme) for scheme in schemes]
    lines += ["  unit {unit_id}: {context} over {trace}, deadline {deadline_s:g} s".format(**unit) for unit in units]
    return "\n".join(lines)


def compare_command(args: argparse.Namespace) -> int:
    from testbed import comparison

    result = comparison.compare(*args.runs)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    print(json.dumps(result, indent=1) if args.json else comparison.text(result, width))
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from testbed import doctor

    checks = doctor.probe()
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        doctor.show(checks)
    return doctor.status(checks)
