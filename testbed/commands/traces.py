"""`kvstream trace ...`: list, show, convert and generate traces, and replay one on an emulated link."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = subparsers.add_parser("trace", help="list, show, convert, generate and replay bandwidth traces")
    commands = trace.add_subparsers(dest="trace_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="the traces of the library, the generators and the file formats")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    show = commands.add_parser("show", help="draw a trace in the terminal, or as a figure")
    show.add_argument("trace", help="a library name, a file, or a generator: uniform,low=5Mbps,high=55Mbps,seed=7")
    show.add_argument("--figure", metavar="FILE", help="write a figure instead (.svg, .png or .pdf)")
    show.add_argument("--json", action="store_true", help="print numbers and provenance as JSON")
    show.set_defaults(run=show_command)

    convert = commands.add_parser("convert", help="read a trace in one format and write it in another")
    convert.add_argument("trace", help="a file (format by --from or by itself) with part and transforms, or a name")
    convert.add_argument("output", help="the file to write")
    convert.add_argument("--from", dest="source_format", metavar="FORMAT", help="format of the file that is read")
    convert.add_argument("--to", default="kvstream", metavar="FORMAT", help="format to write (default: kvstream)")
    convert.add_argument("--json", action="store_true", help="print what was written as JSON")
    convert.set_defaults(run=convert_command)

    generate = commands.add_parser("generate", help="write a generated trace to a file")
    generate.add_argument("trace", help="a generator with settings: markov,low=10Mbps,high=80Mbps,seed=3")
    generate.add_argument("output", help="the file to write, in kvstream's own format")
    generate.add_argument("--json", action="store_true", help="print what was written as JSON")
    generate.set_defaults(run=convert_command, source_format=None, to="kvstream")

    replay = commands.add_parser("replay", help="replay a trace on an emulated link and measure what it did")
    replay.add_argument("trace", help="a library name, a file or a generator")
    replay.add_argument("--length", default="10s", help="how long to replay (default: 10s)")
    replay.add_argument("--link", default="", help="link settings: delay=20ms,queue=50ms,cc=cubic")
    replay.add_argument("--measure", action="store_true", help="fill the link with TCP and print the error per window")
    replay.add_argument(
        "--receivers", type=int, default=1, metavar="N", help="with --measure: so many share the link, a flow each"
    )
    replay.add_argument("--json", action="store_true", help="print the measurement as JSON")
    replay.set_defaults(run=replay_command)


def list_command(args: argparse.Namespace) -> int:
    from traces import formats, generators, library

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

    from traces.units import format_rate, format_time

    print("Library (kvstream trace show NAME):")
    for name in library.names():
        trace = library.load(name)
        print(f"  {name:<24} mean {format_rate(trace.mean_bps):>12}, {format_time(trace.duration_s)}")
    print("Families: family/NAME-NNN for", ", ".join(library.families()))
    print("Generators:", ", ".join(sorted(generators.GENERATORS)))
    table = Table("format", "unit", "a row holds for", "rates are", "written", box=None, pad_edge=False)
    for name, one in sorted(formats.FORMATS.items()):
        table.add_row(name, one.unit, one.edge, one.kind or "as the file says", "yes" if one.write else "")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def show_command(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from testbed import trace_view
    from traces.resolve import open_trace

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


def convert_command(args: argparse.Namespace) -> int:
    from testbed.errors import SpecError
    from traces import formats
    from traces.resolve import open_trace

    if args.source_format is None:
        trace = open_trace(args.trace)
    elif Path(args.trace).is_file():  # whose name may hold a comma
        trace = formats.load(args.trace, args.source_format)
    elif Path(args.trace.partition(",")[0]).is_file():
        trace = open_trace(f"{args.trace},format={args.source_format}")
    else:
        raise SpecError(
            f"--from is for files, and {args.trace.partition(',')[0]} is none; leave --from away for a name"
        )
    formats.save(trace, args.output, args.to)
    if formats.FORMATS[args.to].kind not in (None, trace.kind):
        print(
            f"kvstream: format {args.to} cannot say that rates are {trace.kind}; {args.output} will be read as "
            f"{formats.FORMATS[args.to].kind}",
            file=sys.stderr,
        )
    if args.json:
        facts = {"file": args.output, "name": trace.name, "rows": len(trace.rates_bps), "format": args.to}
        print(json.dumps(facts | {"sha256": trace.sha256}, indent=1))
    else:
        print(f"{args.output}: {trace.name}, {len(trace.rates_bps)} rows, format {args.to}")
    return 0


def replay_command(args: argparse.Namespace) -> int:
    from testbed.emulator import sandbox
    from testbed.errors import SpecError

    if args.receivers != 1 and not args.measure:
        raise SpecError("--receivers goes with --measure, which sends to them")
    if not sandbox.inside():
        return sandbox.run([sys.executable, "-m", "testbed.cli", *sys.argv[1:]])
    from testbed.emulator import measure
    from testbed.plugs import make_link
    from traces.resolve import open_trace
    from traces.units import parse_time

    result = measure.replay(
        open_trace(args.trace),
        make_link(args.link),
        parse_time(args.length),
        fill=args.measure,
        receivers=args.receivers,
    )
    print(json.dumps(result.to_json(), indent=1) if args.json else result.text())
    return 0 if result.verdict.ok else 3
