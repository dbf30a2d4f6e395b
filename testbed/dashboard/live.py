"""The live dashboard of a run: a process of its own that starts before the run and ends with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstream.testbed.errors import MachineError


@contextmanager
def live_dashboard(run_folder: Path) -> Iterator[str]:
    """Serve a run's dashboard from a process of its own; gives the URL.

    The run need not have started. Call it outside the run's namespaces, which a browser cannot reach. The process ends
    when its standard input is closed: with the block, and with this process however that ends.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstream.testbed.dashboard.live", str(run_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise MachineError("the dashboard did not start; kvstream dashboard RUN says why")
        yield url
    finally:
        process.communicate()  # closes its standard input


async def _until_orphaned(run_folder: Path) -> None:
    from kvstream.testbed.dashboard.server import serve
    from kvstream.testbed.results.folder import Run

    serving = asyncio.create_task(serve(Run(run_folder), say=lambda url: print(url, flush=True)))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(sys.stdin.fileno())  # a closed file stays readable, and this would interrupt the closing
        serving.cancel()

    loop.add_reader(sys.stdin.fileno(), stop)
    with suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    asyncio.run(_until_orphaned(Path(sys.argv[1])))
