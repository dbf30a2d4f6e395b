"""`kvstream requests`: many requests in time, and the highest rate at which enough of them are in time."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.testbed.commands.arguments import count
from kvstream.testbed.errors import MachineError
from kvstream.testbed.terminal import many, say

if TYPE_CHECKING:
    from kvstream.testbed.config.requests import RequestsSpec
    from kvstream.testbed.requests.sweep import Point


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    requests = subparsers.add_parser(
        "requests",
        help="SLO attainment and goodput of many requests in time",
        description="Serve many requests, as they come in time, on receivers that share a link or have their own, in "
        "the simulator or over an emulated link, and find the highest rate at which enough of them meet their deadline "
        "(goodput).",
    )
    requests.add_argument("spec", nargs="?", metavar="SPEC", help="a TOML file; options take its place")
    requests.add_argument("--name", help="name of the run and of its folder")
    requests.add_argument("--runs", default="runs", metavar="DIR", help="parent folder of runs (default: runs)")
    requests.add_argument("--requests", metavar="FILE", help="a trace in Mooncake's format, or chats (default)")
    requests.add_argument("--count", type=count, help="requests in a row (default: 2000)")
    requests.add_argument("--repetitions", type=count, help="rows of requests at each rate (default: 5)")
    requests.add_argument("--arrivals", help="poisson (default), bursts,size=8 or trace: when requests come")
    requests.add_argument("--rate", action="append", type=float, help="requests per second; repeatable; "
                          "default: rates around the targets are searched")  # fmt: skip
    requests.add_argument("--deadline", help="the SLO on TTFT, such as 2s (default)")
    requests.add_argument("--workload", help="model and GPU: mistral-7b,compute=h200 (default: a40)")
    requests.add_argument("--trace", help="the link's rate over time (default: constant,rate=10Gbps)")
    requests.add_argument("--link", help="link settings: delay=1ms")
    requests.add_argument(
        "--fleet", help="receivers=8,slots=2,link=shared,cache=0,store=none,chunk=1536 (default); link=own; in tokens"
    )
    requests.add_argument("--order", help="fcfs (default), shortest,admit=feasible, or ./mine.py:Mine")
    requests.add_argument("--policy", action="append", help="a policy to compare; repeatable (default: five schemes)")
    requests.add_argument("--codec", help="the codec of all --policy schemes (default: kvstream)")
    requests.add_argument("--seed", type=int, help="seed of the arrivals")
    requests.add_argument(
        "--emulated", action="store_true", help="over an emulated link with real receivers, and in the simulator beside"
    )
    requests.add_argument("--json", action="store_true", help="print the results as JSON")
    requests.set_defaults(run=requests_command)


def requests_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.config.experiment import about
    from kvstream.testbed.emulator import sandbox
    from kvstream.testbed.requests import emulated
    from kvstream.testbed.requests import sweep as requests
    from kvstream.testbed.results.claim import claimed

    sweep = requests.Sweep(resolve(args))
    if sweep.spec.emulated and not sandbox.inside():
        emulated.check(sweep)
        if problem := sandbox.available():
            raise MachineError(problem)
        return sandbox.run([sys.executable, "-m", "kvstream.testbed.cli", *sys.argv[1:]])
    folder = Path(args.runs) / sweep.spec.name
    with claimed(folder, ""):
        on_point = _silent if args.json or not sys.stderr.isatty() else _say
        if sweep.spec.emulated:
            say(f"Requests over an emulated link, {about(emulated.predicted_s(sweep))}", error=True)
            body = emulated.run(sweep, folder, on_point)
        else:
            body = requests.to_json(sweep, [sweep.curve(scheme, on_point) for scheme in sweep.spec.schemes])
        file = requests.write(folder, body)
        picture = None
        if find_spec("seaborn") is not None:
            from kvstream.testbed.report import attainment

            picture = attainment.draw(body, folder)
    if args.json:
        print(file.read_text(), end="")
        return 0
    facts = body["requests"]
    rows = f"{facts['count']} x {body['spec']['repetitions']} requests of {facts['trace']} per rate"
    place = "Backend mininet" if sweep.spec.emulated else "SIMULATOR"
    say(f"{place}, SYNTHETIC workload: {body['workload']}, {many(body['fleet']['receivers'], 'receiver')}")
    say(f"{rows}: {facts['tokens']:.0f} tokens each, {facts['reusable']:.0%} of them seen before")
    if body["simplified"]:
        say(f"The simulator {body['simplified']}")
    print(f"\n{requests.table(body)}\n")
    if sweep.spec.emulated:
        print(f"The same in the simulator:\n\n{requests.table(body | {'curves': body['simulated']})}\n")
        say(emulated.verdict(body))
    say(f"{requests.verdict(body)}\nResults: {file}")
    if picture is not None:
        print(f"Figure: {picture}")
    return 0


def resolve(args: argparse.Namespace) -> RequestsSpec:
    """The spec of a command line: the file's, or the default, with the options applied."""
    from kvstream.testbed.config import requests
    from kvstream.testbed.config.experiment import Scheme
    from kvstream.traces.units import parse_time

    base = requests.load(args.spec) if args.spec else requests.RequestsSpec()
    names = ("name", "requests", "count", "repetitions", "arrivals", "workload", "trace", "link", "fleet", "order",
             "seed")  # fmt: skip
    changes: dict[str, Any] = {name: given for name in names if (given := getattr(args, name)) is not None}
    if args.rate:
        changes["rates"] = tuple(args.rate)
    if args.emulated:
        changes["emulated"] = True
    if args.deadline:
        changes["deadline_s"] = parse_time(args.deadline)
    if args.policy:
        codec = args.codec or "kvstream"
        changes["schemes"] = tuple(Scheme(policy, codec) for policy in args.policy)
    return requests.checked(replace(base, **changes))


def _say(point: Point) -> None:
    say(f"  {point.scheme}: {point.met_rate:.1%} in time at {point.rate:.3g} requests/s", error=True)


def _silent(point: Point) -> None:
    """In a pipe."""
