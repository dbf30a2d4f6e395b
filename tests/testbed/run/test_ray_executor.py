"""Units on a Ray cluster of two nodes, one of which is killed in the middle: the rows of a run without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.cli import main
from kvstream.testbed.config import experiment
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.results.folder import Run
from kvstream.testbed.run import ray_executor
from kvstream.testbed.run.ray_executor import Ray
from kvstream.testbed.run.shards import WHOLE, Shard
from kvstream.testbed.run.simulated import run_simulated

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvstream-testbed[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

SLOW_S = 0.1
POLICY = f"""
import time
from dataclasses import dataclass
from pathlib import Path

from kvstream.policies.api import Choice

@dataclass
class Slow:
    log: str = ""

    def __post_init__(self):
        self.asked = False

    def choose(self, obs):
        if self.log and not self.asked:
            import ray
            node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "none"
            with open(self.log, "a") as file:
                file.write(node + chr(10))
            time.sleep({SLOW_S})
        self.asked = True
        return Choice(obs.chunk % obs.n_levels)
"""
SPEC = """
contexts = ["docs", "code"]
traces = ["steady,scale_mean=60Mbps", "wifi,scale_mean=60Mbps"]
deadlines_s = [0.6, 0.8]
repetitions = 5
[[schemes]]
policy = "./slow.py:Slow{log}"
codec = "uniform"
label = "slow"
[[schemes]]
policy = "throughput"
codec = "uniform"
"""
UNITS, SESSIONS = 40, 80
FILES = ("sessions.jsonl", "chunks.jsonl")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ray")
    (found / "slow.py").write_text(POLICY)
    (found / "x.toml").write_text(SPEC.format(log=f",log={found / 'log'}"))
    return found


@pytest.fixture(scope="module")
def plain(folder: Path) -> Run:
    """The run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = ran(folder / "runs" / "plain")
    (folder / "log").unlink()
    return run


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def ran(path: Path, on: Ray | None = None, shard: Shard = WHOLE) -> Run:
    run = Run(path)
    run_simulated(experiment.load("x.toml"), run, quiet=True, shard=shard, on=on)
    run.rebuild()
    return run


def same(one: Run, other: Run) -> bool:
    return all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in FILES)


def test_a_node_that_is_killed_costs_no_row_and_doubles_none(cluster: Any, plain: Run, folder: Path) -> None:
    """Its units are begun twice and counted once. The policy's file reaches the workers with the run."""
    second = cluster.add_node(num_cpus=1)
    log = folder / "log"

    def kill() -> None:
        limit_s = time.monotonic() + 60.0
        while time.monotonic() < limit_s and not (log.is_file() and second.node_id in log.read_text()):
            time.sleep(0.01)
        time.sleep(2.5 * SLOW_S)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    run = ran(folder / "runs" / "killed", Ray(cluster.address))
    killer.join()
    begun = log.read_text().split()
    assert begun.count(second.node_id) >= 1, "the second node had its part"
    assert len(begun) > UNITS, "what it was computing was begun again"
    assert len(set(begun)) == 2
    assert same(plain, run)
    assert len(run.rows()) == SESSIONS


def test_shards_and_resumption_on_ray_give_the_run_in_one_go(cluster: Any, plain: Run, folder: Path) -> None:
    path = folder / "runs" / "parts"
    ran(path, shard=Shard(1, 3))
    ran(path, Ray(cluster.address), Shard(2, 3))
    before = {file.name: file.stat().st_mtime_ns for file in (path / "cells").iterdir()}
    run = ran(path, Ray(cluster.address))
    assert same(plain, run)
    assert all((path / "cells" / name).stat().st_mtime_ns == at for name, at in before.items()), "nothing twice"


def where_from(_: int) -> str:
    import kvstream

    return str(kvstream.__file__)


def wrong(number: int) -> int:
    if number == 3:
        raise SpecError("three is wrong; give another")
    return number


def test_code_travels_and_errors_are_those_of_the_unit(cluster: Any) -> None:
    with ray_executor.cluster(Ray(cluster.address)) as workers:
        assert workers >= 1
        assert "runtime_resources" in next(ray_executor.results(where_from, range(1), workers))
        assert list(ray_executor.results(wrong, range(3), workers)) == [0, 1, 2]
        with pytest.raises(SpecError, match=r"^three is wrong; give another$"):
            list(ray_executor.results(wrong, range(5), workers))


def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(MachineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"),
        ray_executor.cluster(Ray("127.0.0.1:1")),
    ):
        pass
    assert main(["simulate", "x.toml", "--executor", "ray,address=nowhere"]) == 2
    assert "give HOST:PORT" in capsys.readouterr().err
    assert main(["simulate", "x.toml", "--executor", "dask"]) == 2
    assert "unknown executor 'dask'" in capsys.readouterr().err
    assert main(["simulate", "x.toml", "--executor", "ray", "--jobs", "2"]) == 2
    assert "omit one of the two" in capsys.readouterr().err
