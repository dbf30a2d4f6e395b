"""`kvstream dashboard RUN`, and the same beside a run that is going on."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    dashboard = subparsers.add_parser("dashboard", help="watch a run in the browser, or play a finished one again")
    dashboard.add_argument("run_folder", metavar="RUN", help="folder of a run, as in runs/main")
    dashboard.add_argument("--port", type=int, default=0, help="port on loopback (default: any free one)")
    dashboard.set_defaults(run=dashboard_command)


def dashboard_command(args: argparse.Namespace) -> int:
    from testbed.dashboard.server import serve
    from testbed.results import Run

    run = Run.open(args.run_folder)
    try:
        asyncio.run(serve(run, args.port, lambda url: print(f"{url}  (Ctrl-C ends)", flush=True)))
    except KeyboardInterrupt:
        return 0
    return 0


@contextmanager
def beside(run_folder: Path) -> Iterator[str]:
    """The dashboard of a run in a process of its own, so that a run can be watched while it goes on; gives the URL.

    The run's folder and its manifest must be there. The process ends with the block.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed.dashboard.cli", str(run_folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split(" ")[0].strip()
    finally:
        process.terminate()
        process.communicate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_folder")
    parser.add_argument("--port", type=int, default=0)
    sys.exit(dashboard_command(parser.parse_args()))
