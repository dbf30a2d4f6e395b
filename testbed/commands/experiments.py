"""`kvstream run`, `simulate`, `doctor`: run experiments, and check what this machine can do."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.testbed.commands.arguments import count
from kvstream.testbed.commands.concluding import conclude, end, judge_run, threshold_arguments
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.terminal import many, say

if TYPE_CHECKING:
    from kvstream.testbed.config.experiment import Experiment
    from kvstream.testbed.run.shards import Shard


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = subparsers.add_parser(
        "run",
        help="compare schemes over emulated links (the main job without a SPEC)",
        description="Compare schemes over emulated links, or in the simulator where links cannot be emulated.",
    )
    _experiment_arguments(run)
    run.add_argument(
        "--capture", action="store_true", help="capture packets at both ends: round-trip times, retransmissions"
    )
    run.add_argument(
        "--executor", metavar="ray[,address=HOST:PORT]", help="parts as tasks of a Ray cluster, a link a machine"
    )
    run.add_argument("--live", action="store_true", help="print the URL of a page that shows the run live")
    run.set_defaults(run=run_command)

    simulate = subparsers.add_parser("simulate", help="compare schemes in the simulator: no root, no model")
    _experiment_arguments(simulate)
    simulate.add_argument("--jobs", type=count, default=1, metavar="N", help="processes at once (default: 1)")
    simulate.add_argument("--executor", metavar="ray[,address=HOST:PORT]", help="units as tasks of a Ray cluster")
    simulate.set_defaults(run=simulate_command)

    doctor = subparsers.add_parser("doctor", help="check what this machine can do, and how to fix what it cannot")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(run=doctor_command)
    _add_init(subparsers)


def _add_init(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init = subparsers.add_parser(
        "init",
        help="write an experiment file to start from, with a comment on every key",
        description="Write an experiment file with a comment on every key, and its JSON schema for editors beside it.",
    )
    init.add_argument("file", nargs="?", type=Path, default=Path("experiment.toml"), metavar="FILE",
                      help="where to (default: experiment.toml)")  # fmt: skip
    init.add_argument("--json", action="store_true", help="print as JSON")
    init.set_defaults(run=init_command)


def init_command(args: argparse.Namespace) -> int:
    from kvstream.testbed import config

    file: Path = args.file
    if file.suffix != ".toml":
        raise SpecError(f"{file}: an experiment is a .toml file; name it {file.name.partition('.')[0]}.toml")
    if file.exists():
        raise SpecError(f"{file} exists; choose another name")
    shipped = Path(config.__file__).parent
    schema = file.with_name("experiment.schema.json")
    schema.write_bytes((shipped / schema.name).read_bytes())
    file.write_text((shipped / "experiment.toml.template").read_text(encoding="utf-8").replace("THIS_FILE", str(file)))
    if args.json:
        print(json.dumps({"file": str(file), "schema": str(schema)}, indent=1))
    else:
        say(f"{file} written, with {schema.name} for editors; run it with: kvstream simulate {file}")
    return 0


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="a TOML file, or main or smollm2 (default: main)")
    parser.add_argument("--name", help="name of the run and of its folder")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="parent folder of runs (default: runs)")
    parser.add_argument("--model", help="folder or name of a causal language model (default: the bundled one)")
    parser.add_argument("--device", help="the receiver's device for decoding and the model: cpu (default) or cuda")
    parser.add_argument("--workload", help="a synthetic workload: mistral-7b, llama-34b or llama-70b[,compute=h200]")
    parser.add_argument("--context", action="append", help="name of a shipped context, or a JSON file; repeatable")
    parser.add_argument(
        "--trace",
        action="append",
        help="a name, file, folder or generator: uniform,low=2Mbps,high=22Mbps; repeatable",
    )
    parser.add_argument(
        "--policy", action="append", help="a policy to compare: cachegen, ./mine.py:Mine,gain=2; repeatable"
    )
    parser.add_argument(
        "--codec",
        help="the codec of all --policy schemes: cachegen,coder=ac, ./mine.py:Zip (default: the first scheme's)",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="SETTING=A,B,C",
        help="a scheme for each value: policy.safety=0.5,0.9, codec.coder=ac,rans, depth=1,2; repeatable",
    )
    parser.add_argument(
        "--offset", action="append", help="where in a trace to start, such as 30s; repeatable; or random"
    )
    parser.add_argument("--deadline", action="append", help="TTFT deadline, such as 800ms; repeatable")
    parser.add_argument(
        "--link", action="append", help="link settings: delay=20ms,loss=0.1%%,queue=50ms,cc=cubic; repeatable"
    )
    parser.add_argument(
        "--probe", action="store_true", help="probe the link before each session, so that policies see prior_bps"
    )
    parser.add_argument(
        "--noise",
        action=argparse.BooleanOptionalAction,
        help="simulated sessions: let computing vary as in real sessions (default)",
    )
    parser.add_argument("--seed", type=int, help="seed of the order, questions and random traces")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming an earlier run")
    parser.add_argument("--quick", action="store_true", help="preview only: one context and one deadline")
    parser.add_argument("--shard", metavar="I/N", help="run only every Nth unit, from the Ith on; then kvstream merge")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and how long it takes")
    threshold_arguments(parser)


def run_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.emulator import sandbox

    if args.executor:
        from kvstream.testbed.run import parts, ray_executor

        if args.live or args.shard:
            raise SpecError("--executor does without --live and --shard; omit them")
        return _carry_out(args, partial(parts.run_on_cluster, on=ray_executor.parse(args.executor)))
    if not args.dry_run and not sandbox.inside():
        problem = sandbox.available()
        if problem is None:
            return _in_sandbox(args)
        if args.spec or args.link or args.live:
            raise MachineError(problem)
        say(f"kvstream: no emulated link here ({problem}): this is the SIMULATOR", error=args.json)
        return simulate_command(args)
    from kvstream.testbed.run import emulated as runner

    return _carry_out(args, runner.run_emulated)


def _in_sandbox(args: argparse.Namespace) -> int:
    """Run the command in namespaces of its own; the dashboard stays outside, where a browser can reach it."""
    from kvstream.testbed.emulator import sandbox

    argv = [sys.executable, "-m", "kvstream.testbed.cli", *_own_arguments()]
    if not args.live:
        return sandbox.run(argv)
    from kvstream.testbed.dashboard.live import live_dashboard

    folder = Path(args.runs) / resolve(args).name
    out = sys.stderr if args.json else sys.stdout
    with live_dashboard(folder) as url:
        print(f"Live: {url}", file=out, flush=True)
        status = sandbox.run(argv)
    print(f"Replay it with: kvstream dashboard {folder}", file=out)
    return status


def simulate_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.run import ray_executor, simulated

    jobs, executor = getattr(args, "jobs", 1), getattr(args, "executor", None)
    if executor and jobs > 1:
        raise SpecError("--executor and --jobs are both given; omit one of the two")
    on = ray_executor.parse(executor) if executor else None
    return _carry_out(args, partial(simulated.run_simulated, jobs=jobs, on=on))


def _own_arguments() -> Sequence[str]:
    return sys.argv[1:] or ["run"]


def _carry_out(args: argparse.Namespace, run_units: Any) -> int:
    """Check, then run in a folder that nobody else writes."""
    from kvstream.testbed.results import thresholds
    from kvstream.testbed.results.claim import claimed
    from kvstream.testbed.run import check_inputs, shards

    begun_s = time.monotonic()
    experiment = resolve(args)
    shard = shards.parse(args.shard) if args.shard else shards.WHOLE
    if not shard.is_whole and (args.fresh or args.fail_if or args.junit or args.markdown):
        raise SpecError("--shard does without --fresh, which would remove the other shards' sessions, and without "
                        "--fail-if, --junit and --markdown: give these to kvstream merge")  # fmt: skip
    limits = [thresholds.parse(text) for text in args.fail_if]
    check_inputs.check(experiment)
    compared = [scheme.name for scheme in experiment.schemes if not scheme.reference]
    thresholds.check(limits, compared, [unit.trace for unit in experiment.units()])
    for remark in _remarks(experiment):
        say(f"kvstream: {remark}", error=True)
    folder = Path(args.runs) / experiment.name
    if args.dry_run:
        planned = plan(experiment, folder, shard, emulated=args.command == "run")
        print(json.dumps(planned, indent=1)) if args.json else say(_plan_text(planned))
        return 0
    with claimed(folder, "" if shard.is_whole else f"{shard.index}-of-{shard.count}"):
        return _carry_out_in(folder, experiment, shard, args, run_units, begun_s)


def _carry_out_in(
    folder: Path, experiment: Experiment, shard: Shard, args: argparse.Namespace, run_units: Any, begun_s: float
) -> int:
    """Run the missing sessions, then summarise, report and check the thresholds."""
    from kvstream.testbed.results.folder import Run
    from kvstream.testbed.run import shards

    if args.fresh and folder.exists():
        Run.open(folder)
        shutil.rmtree(folder)
    run = Run(folder)
    quiet = args.json
    try:
        run_units(experiment, run, quiet=quiet, shard=shard)
    except KeyboardInterrupt:
        so_far = ""
        if shard.is_whole and run.cells.is_dir() and any(run.cells.glob("*.json")):
            summary = conclude(run, quiet=quiet)
            end(run, summary)
            so_far = summary["unfinished"] and f"Interrupted: {summary['unfinished']}. "
        say(f"\n{so_far}Finished sessions are kept in {folder}; run the same command without --fresh to resume",
            error=True)  # fmt: skip
        raise
    left = 0 if shard.is_whole else shards.left(experiment, run)
    if left:
        done = {"name": experiment.name, "folder": str(folder), "shard": str(shard), "left": left}
        are = "is" if left == 1 else "are"
        words = f"Shard {shard} is done. {many(left, 'session')} of other shards {are} not in {folder} yet"
        print(json.dumps(done, indent=1) if args.json else words)
        return 0
    return judge_run(args, run, begun_s)


def _remarks(experiment: Experiment) -> list[str]:
    """What should be known of the traces before they are used."""
    remarks = []
    if skipped := experiment.opened.skipped:
        shown = ", ".join(list(skipped)[:3]) + (", ..." if len(skipped) > 3 else "")
        remarks.append(f"{many(len(skipped), 'file')} of sets cannot be read, skipped: {shown}")
    longest_s = max(experiment.deadlines_s)
    if not experiment.offsets and experiment.offsets_s == (0.0,) and (begun := experiment.opened.beginnings(longest_s)):
        length_s = experiment.opened.every[begun[0]].trace.duration_s
        others = f" and of {many(len(begun) - 1, 'other trace')}" if begun[1:] else ""
        which = f"the {length_s:.0f} s of {begun[0]}{others}"
        remarks.append(
            f"sessions of {longest_s:g} s see only the beginning of {which}; "
            '--offset random (in a file: offsets = "random") starts them anywhere'
        )
    return remarks


def resolve(args: argparse.Namespace) -> Experiment:
    """The experiment of a command line: the file's, or the main job's, with the options applied."""
    from kvstream.testbed.config import experiment as experiments
    from kvstream.testbed.lab.submission import spec_of
    from kvstream.testbed.workloads import synthetic
    from kvstream.traces.units import parse_time

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
        ("noise", "noise"),
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
    if args.offset:
        is_random = args.offset == ["random"]
        changes["offsets"] = "random" if is_random else ""
        changes["offsets_s"] = (0.0,) if is_random else tuple(parse_time(text) for text in args.offset)
    if args.sweep:
        changes["sweep"] = (*base.sweep, *args.sweep)
    if args.policy:
        changes["sweep"] = tuple(args.sweep or ())  # the file's are of its own schemes
        codec = args.codec or base.schemes[0].codec
        changes["schemes"] = tuple(experiments.Scheme(spec_of(policy), codec) for policy in args.policy)
        changes["baseline"] = ""
    elif args.codec:
        raise SpecError("--codec needs --policy: give the policies that use it")
    if changes and "name" not in changes:
        changes["name"] = f"{base.name}-custom"
    if "traces" in changes and not args.offset:
        changes["offsets"] = ""  # these belong to the experiment's own traces
    if changes.keys() - {"name", "seed"}:
        changes["simulated_repetitions"] = 0
    chosen = swept(experiments.checked(replace(base, **changes)))
    return chosen.quick() if args.quick else chosen


def swept(experiment: Experiment) -> Experiment:
    """With a scheme for every combination of its sweep. Policies from files are tried before they are looked into."""
    if not experiment.sweep:
        return experiment
    from kvstream.testbed.config import sweeps
    from kvstream.testbed.simulator.trial import try_policy

    for policy in dict.fromkeys(scheme.policy for scheme in experiment.schemes):
        try_policy(policy)
    return sweeps.expanded(experiment)


def plan(experiment: Experiment, folder: Path, shard: Shard, *, emulated: bool) -> dict[str, Any]:
    """What would run in a shard. `predicted_s` is the duration over emulated links, None in the simulator."""
    from dataclasses import asdict

    units, sessions = [unit for unit in experiment.units() if shard.has(unit)], shard.sessions(experiment)
    return {
        "name": experiment.name,
        "folder": str(folder),
        "size": experiment.size + shard.words,
        "sessions": len(sessions),
        "predicted_s": experiment.predicted_s(unit for unit, _ in sessions) if emulated else None,
        "schemes": [asdict(scheme) | {"name": scheme.name} for scheme in experiment.schemes],
        "units": [asdict(unit) | {"unit_id": unit.unit_id} for unit in units],
    }


def _plan_text(planned: dict[str, Any]) -> str:
    from kvstream.testbed.config.experiment import about

    where = "in the simulator"
    if planned["predicted_s"] is not None:
        where = f"{about(planned['predicted_s'])} over emulated links"
    sessions = many(planned["sessions"], "session")
    lines = [f"{planned['name']}: {planned['size']} = {sessions}, {where}, into {planned['folder']}"]
    for scheme in planned["schemes"]:
        mark = ", reference line" if scheme["reference"] else ""
        lines.append("  scheme {name}: policy {policy}, codec {codec}, depth {depth}".format(**scheme) + mark)
    for unit in planned["units"]:
        start = f" from {unit['offset_s']:g} s" if unit["offset_s"] else ""
        lines.append(
            "  unit {unit_id}: {context} over {trace}{start}, deadline {deadline_s:g} s".format(**unit, start=start)
        )
    return "\n".join(lines)


def doctor_command(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from kvstream.testbed.emulator import doctor

    checks = doctor.probe()
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        doctor.show(checks)
    return doctor.status(checks)
