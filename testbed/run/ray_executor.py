"""Units of a run as tasks on a Ray cluster: `--executor ray[,address=HOST:PORT]` (the extra [ray]).

A task computes a unit and returns its sessions; the process that started the run writes their cells, so that results,
resumption, failures and progress are those of a run without Ray. This package and relative files of policies travel
by Ray's runtime environment, and everything that all units need once by its object store. What a lost worker, or a lost
machine, was computing is computed again elsewhere.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import kvstream
from kvstream.testbed.config import specs
from kvstream.testbed.errors import MachineError, SpecError

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES: Final = 10
"""How often a task is started again whose worker or machine was lost. One that exhausts a machine's memory ends so."""
LINK: Final = "kvstream_link"
"""The resource that a machine has which can emulate a link: one."""
AHEAD: Final = 16
"""Tasks per processor that are handed out before their turn: a unit may take less time than the way to its worker."""

ANSWER_S: Final = 10.0
"""A cluster's head that does not take a connection for so long is not there."""

_tasks: dict[Any, Callable[[Any], Any]] = {}
"""In a worker: what it does with each item, by the reference to it; of the newest run only."""


@dataclass(frozen=True)
class Ray:
    """The settings of `--executor ray`."""

    address: str = ""
    """Of the cluster's head, or `auto`; without one, this machine's processors for the time of the run."""


def parse(text: str) -> Ray:
    """`ray` or `ray,address=10.0.0.1:6379`. Raises SpecError."""
    spec = specs.parse(text, "executor")
    if spec.name != "ray":
        raise SpecError(f"unknown executor {spec.name!r}; choose ray, or omit it and use --jobs")
    found = specs.build(Ray, spec.settings, "executor ray")
    if found.address not in ("", "auto") and not found.address.rpartition(":")[2].isdecimal():
        raise SpecError(f"executor ray: address={found.address}; give HOST:PORT of the cluster's head, or auto")
    return found


@contextmanager
def cluster(where: Ray, files: Iterable[str] = ()) -> Iterator[int]:
    """A connection to the cluster; yields its number of processors. `files` are sent along, those of relative paths.

    Raises MachineError if the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a testbed tells nobody what runs on it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future way: tasks without GPUs see them
    import ray

    _knock(where.address)
    with tempfile.TemporaryDirectory() as folder:
        # `kvstream` in a checkout is links, which Ray follows
        environment: dict[str, Any] = {"py_modules": [kvstream.__path__[0]], "excludes": ["**/__pycache__"]}
        if _copied(files, Path(folder)):
            environment["working_dir"] = folder
        try:
            ray.init(
                where.address or "local",
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if where.address else False,
                resources=None if where.address else {LINK: 1.0},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = f"no Ray cluster answers at {where.address}" if where.address else "Ray does not start here"
            raise MachineError(f"{what} ({str(error).splitlines()[0][:200]})") from None
        try:
            yield max(1, int(ray.cluster_resources().get("CPU", 1)))
        finally:
            ray.shutdown()


def links() -> int:
    """Machines of the connected cluster that can emulate a link."""
    import ray

    return int(ray.cluster_resources().get(LINK, 0))


def results(
    do: Callable[[Item], Result], items: Iterable[Item], workers: int, *, gpus: int = 0, link: bool = False
) -> Iterator[Result]:
    """What `do` returns for each item, in their order, computed by the tasks of a cluster that is connected; a task
    takes GPUs, and a machine's link, if told so.

    Raises what `do` raises, and MachineError for a task that lost its worker too often.
    """
    import ray

    task = [ray.put(do)]  # in a list, Ray hands the reference on and not the value
    work = ray.remote(max_retries=RETRIES, num_gpus=gpus, resources={LINK: 1.0} if link else {})(_work)
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(work.remote(task, item))
            if len(waiting) >= AHEAD * workers:
                yield _got(waiting.popleft())
        while waiting:
            yield _got(waiting.popleft())
    finally:
        for left in waiting:
            with suppress(ray.exceptions.RayError):
                ray.cancel(left)


def _knock(address: str) -> None:
    """Raise MachineError if nothing listens there: Ray would wait for minutes."""
    if address in ("", "auto"):
        return
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise MachineError(f"no Ray cluster answers at {address} ({error}); start it with ray start --head") from None


def _got(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise MachineError(
            f"a unit lost its worker {RETRIES} times, perhaps for want of memory ({type(error).__name__}); what is "
            "finished is kept: run the same command again"
        ) from None


def _work(task: list[Any], item: Any) -> Any:
    import ray

    reference = task[0]
    if reference not in _tasks:
        _tasks.clear()
        _tasks[reference] = ray.get(reference)
        gc.freeze()  # what Ray and the run hold is no garbage; each collection would walk it, a tenth of a unit's time
    return _tasks[reference](item)


def _copied(files: Iterable[str], folder: Path) -> bool:
    """Copy files of relative paths; whether there were any. Others are taken to be on all machines."""
    found = False
    for name in files:
        path = Path(name)
        if not path.is_absolute() and ".." not in path.parts:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path)
            found = True
    return found
