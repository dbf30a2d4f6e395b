"""`kvstream dashboard RUN`."""

from __future__ import annotations

import argparse

from kvstream.testbed.commands.arguments import port


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    dashboard = subparsers.add_parser("dashboard", help="watch a run in the browser, live or replayed")
    dashboard.add_argument("run_folder", metavar="RUN", help="folder of a run, such as runs/main")
    dashboard.add_argument("--port", type=port, default=0, help="port on loopback (default: any free one)")
    dashboard.set_defaults(run=dashboard_command)


def dashboard_command(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the first line printed is the URL."""
    import asyncio
    import os
    from contextlib import suppress

    from kvstream.testbed.dashboard.server import serve
    from kvstream.testbed.errors import SpecError
    from kvstream.testbed.results.folder import Run

    run = Run.open(args.run_folder)
    _ = run.manifest  # a damaged one is reported here and not in the browser
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(run, args.port, lambda url: print(f"{url}  (Ctrl-C ends)", flush=True)))
    except OSError as error:
        if error.errno is None:
            raise
        raise SpecError(f"port {args.port}: {os.strerror(error.errno).lower()}; give another --port") from error
    return 0
