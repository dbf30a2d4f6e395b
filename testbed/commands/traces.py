"""`kvstream trace ...`: list, show, convert and generate traces, and replay one on an emulated link."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvstream.testbed.terminal import many, say

if TYPE_CHECKING:
    from kvstream.testbed.emulator.link import LinkSettings
    from kvstream.traces.trace import Trace


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = subparsers.add_parser("trace", help="list, show, convert, generate and replay bandwidth traces")
    commands = trace.add_subparsers(dest="trace_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="list the library's traces, the generators and the file formats")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    show = commands.add_parser("show", help="draw a trace in the terminal, or as a figure")
    show.add_argument("trace", help="a library name, a file, or a generator: uniform,low=5Mbps,high=55Mbps,seed=7")
    show.add_argument("--figure", metavar="FILE", help="write a figure instead (.svg, .png or .pdf)")
    show.add_argument("--json", action="store_true", help="print numbers and provenance as JSON")
    show.set_defaults(run=show_command)

    convert = commands.add_parser("convert", help="convert a trace to another format")
    convert.add_argument("trace", help="a file, with part and transforms, or a name")
    convert.add_argument("output", help="the file to write")
    convert.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="format of the input file (default: detected)"
    )
    convert.add_argument("--to", default="kvstream", metavar="FORMAT", help="format to write (default: kvstream)")
    convert.add_argument("--json", action="store_true", help="print what was written as JSON")
    convert.set_defaults(run=convert_command)

    generate = commands.add_parser("generate", help="write a generated trace to a file")
    generate.add_argument("trace", help="a generator with settings: markov,low=10Mbps,high=80Mbps,seed=3")
    generate.add_argument("output", help="the file to write, in kvstream's own format")
    generate.add_argument("--json", action="store_true", help="print what was written as JSON")
    generate.set_defaults(run=convert_command, source_format=None, to="kvstream")

    replay = commands.add_parser(
        "replay",
        help="replay a trace on an emulated link and measure its fidelity, or run a command behind it",
        description="Replay a trace on an emulated link: alone, saturated with TCP (--measure), or with a command at "
        "its end. The command is the last word: after --, with its own options.",
        usage="%(prog)s [options] TRACE [-- COMMAND ...]",
    )
    replay.add_argument("trace", metavar="TRACE", help="a library name, a file or a generator")
    replay.add_argument("--length", help="how long to replay (default: 10s), or the command's time limit (10min)")
    replay.add_argument("--link", default="", help="link settings: delay=20ms,queue=50ms,cc=cubic")
    replay.add_argument("--measure", action="store_true", help="fill the link with TCP and print the error per window")
    replay.add_argument(
        "--receivers",
        type=int,
        default=1,
        metavar="N",
        help="with --measure: share the link among N receivers, one flow each",
    )
    replay.add_argument(
        "--both",
        metavar="SERVER",
        help="with a command: what runs at the other end, such as 'iperf3 -s' (default: serve this folder by HTTP)",
    )
    replay.add_argument("--json", action="store_true", help="print the measurement as JSON")
    replay.set_defaults(run=replay_command)


def list_command(args: argparse.Namespace) -> int:
    from kvstream.traces import formats, generators, library

    if args.json:
        about = {
            name: {"unit": one.unit, "edge": one.edge, "kind": one.kind, "written": one.write is not None}
            for name, one in sorted(formats.FORMATS.items())
        }
        listed = {"library": library.names(), "generators": sorted(generators.GENERATORS), "formats": about}
        print(json.dumps(listed, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    from kvstream.traces.units import format_rate, format_time

    print("Library (kvstream trace show NAME):")
    for name in library.names():
        trace = library.load(name)
        print(f"  {name:<24} mean {format_rate(trace.mean_bps):>12}, {format_time(trace.duration_s)}")
    say(f"Families: family/NAME-NNN for {', '.join(library.families())}")
    say(f"Generators: {', '.join(sorted(generators.GENERATORS))}")
    table = Table("format", "unit", "a row holds for", "rates are", "written", box=None, pad_edge=False)
    for name, one in sorted(formats.FORMATS.items()):
        table.add_row(name, one.unit, one.edge, one.kind or "as the file says", "yes" if one.write else "")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def show_command(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from kvstream.testbed.report import trace_view
    from kvstream.traces import sets
    from kvstream.traces.resolve import open_trace

    if sets.is_set(args.trace):
        return _show_set(args.trace, as_json=args.json)
    trace = open_trace(args.trace)
    if args.figure:
        trace_view.draw_figure(trace, Path(args.figure))
        print(args.figure)
    elif args.json:
        facts = {"name": trace.name, "kind": trace.kind, "per": trace.per, "end": trace.end, "sha256": trace.sha256}
        facts |= {"story": trace.story}
        numbers = {} if trace.per == "chunk" else {"duration_s": trace.duration_s, "mean_bps": trace.mean_bps}
        columns = {name: getattr(trace, name) for name in ("durations_s", "rates_bps", "delay_s", "loss")}
        rows = {name: None if column is None else column.tolist() for name, column in columns.items()}
        print(json.dumps(facts | numbers | rows | {"provenance": [asdict(p) for p in trace.provenance]}, indent=1))
    else:
        print(trace_view.draw_terminal(trace))
    return 0


def _show_set(spec: str, *, as_json: bool) -> int:
    """A line for each file of a set: what it is, or why it cannot be read."""
    from kvstream.traces import sets
    from kvstream.traces.units import format_rate, format_time

    found = sets.survey(spec)
    if as_json:
        rows = [
            {
                "name": trace.name,
                "format": trace.provenance[0].format,
                "length_s": None if trace.per == "chunk" else trace.duration_s,
                "mean_bps": trace.mean_bps,
            }
            for trace in (member.trace for member in found.members)
        ]
        print(json.dumps({"traces": rows, "unreadable": dict(found.skipped)}, indent=1))
        return 0
    for trace in (member.trace for member in found.members):
        length = "per chunk" if trace.per == "chunk" else format_time(trace.duration_s)
        line = f"{trace.name:<48} {trace.provenance[0].format:<12} {length:>10}, mean {format_rate(trace.mean_bps)}"
        print(line)
    for name, why in found.skipped.items():
        print(f"{name:<48} unreadable: {why}")
    print(f"{many(len(found.members), 'trace')}, {many(len(found.skipped), 'file')} that cannot be read")
    return 0


def convert_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.errors import SpecError
    from kvstream.traces import formats, grammar
    from kvstream.traces.errors import TraceError
    from kvstream.traces.resolve import open_trace, parsed

    head, settings = parsed(args.trace)
    is_file = Path(head).is_file()
    if args.source_format is not None:
        if not is_file:
            raise SpecError(f"--from is for files, and {head} is not one; omit --from for a name")
        settings = {"format": args.source_format} | settings
    if is_file and Path(args.output).exists() and Path(args.output).samefile(head):
        raise SpecError(f"{args.output} is the input itself; choose another name for the output")
    trace = open_trace(grammar.write(head, settings))
    formats.save(trace, args.output, args.to)
    if formats.FORMATS[args.to].kind not in (None, trace.kind):
        print(
            f"kvstream: format {args.to} cannot record that rates are {trace.kind}; {args.output} will be read as "
            f"{formats.FORMATS[args.to].kind}",
            file=sys.stderr,
        )
    try:
        known = formats.sniff(args.output)
    except TraceError:
        known = ""
    if known != args.to:
        say(f"kvstream: name its format when you read it: {args.output},format={args.to}", error=True)
    if args.json:
        facts = {"file": args.output, "name": trace.name, "rows": len(trace.rates_bps), "format": args.to}
        print(json.dumps(facts | {"sha256": trace.sha256}, indent=1))
    else:
        print(f"{args.output}: {trace.name}, {many(len(trace.rates_bps), 'row')}, format {args.to}")
    return 0


def replay_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.emulator import sandbox
    from kvstream.testbed.errors import SpecError

    if args.receivers != 1 and not args.measure:
        raise SpecError("--receivers needs --measure, which sends to them")
    if args.program and args.measure:
        raise SpecError("--measure fills the link by itself; omit it, or the command")
    if args.both and not args.program:
        raise SpecError("--both needs a command: kvstream trace replay TRACE --both 'iperf3 -s' -- iperf3 -c ...")
    if not sandbox.inside():
        return sandbox.run([sys.executable, "-m", "kvstream.testbed.cli", *sys.argv[1:]])
    from kvstream.testbed.config.build import make_link
    from kvstream.testbed.emulator import measure
    from kvstream.traces.resolve import open_trace
    from kvstream.traces.units import parse_time

    trace, link = open_trace(args.trace), make_link(args.link)
    if args.program:
        return _run_behind(trace, link, args)
    length_s = parse_time(args.length or "10s")
    result = measure.replay(trace, link, length_s, fill=args.measure, receivers=args.receivers)
    print(json.dumps(result.to_json(), indent=1) if args.json else result.text())
    return 0 if result.verdict.ok else 3


def _run_behind(trace: Trace, link: LinkSettings, args: argparse.Namespace) -> int:
    """Run a command behind the link. The exit status is the command's; the verdict on the link stands beside it."""
    import shlex

    from kvstream.testbed.emulator import command
    from kvstream.traces.units import parse_time

    done = command.run(
        trace,
        link,
        args.program,
        parse_time(args.length or "10min"),
        server=shlex.split(args.both or ""),
        stdout=sys.stderr.fileno() if args.json else None,
    )
    if args.json:
        print(json.dumps(done.to_json(), indent=1))
    else:
        print("\n".join(f"kvstream: {line}" for line in done.text().splitlines()), file=sys.stderr)
    return done.status
