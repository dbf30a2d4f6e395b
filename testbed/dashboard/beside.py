"""The dashboard beside a run: a process of its own that starts before the run and ends with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from testbed.errors import MachineError


@contextmanager
def beside(run_folder: Path) -> Iterator[str]:
    """The dashboard of a run in a process of its own, so that a run can be watched while it goes on; gives the URL.

    The run need not have begun. Start it outside the run's namespaces: a browser cannot look into them. The process
    ends with the block, and with this process, however that ends: its input is then closed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed.dashboard.beside", str(run_folder)],
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
        process.terminate()
        process.communicate()


async def _until_orphaned(run_folder: Path) -> None:
    from testbed.dashboard.server import serve
    from testbed.results import Run

    serving = asyncio.create_task(serve(Run(run_folder), say=lambda url: print(url, flush=True)))
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), serving.cancel)
    with suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    asyncio.run(_until_orphaned(Path(sys.argv[1])))
