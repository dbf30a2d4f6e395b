"""What a unit of a run costs on Ray beyond itself, and how that grows: `--executor ray` beside one process.

    python benchmarks/ray_units.py [--units N ...] [--out FILE.json]

The same simulated units (three schemes of the main job) in one process, on one worker and on two, in turn, because
machines change their speed; then trivial units (they return their number) on two workers. Printed: seconds,
milliseconds per unit, and, as medians over the turns, what Ray adds to a unit and the ratio of two workers to one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.testbed.config import experiment  # noqa: E402
from kvstream.testbed.config.experiment import Scheme  # noqa: E402
from kvstream.testbed.host import machine  # noqa: E402
from kvstream.testbed.results.folder import Run  # noqa: E402
from kvstream.testbed.run import ray_executor, simulated  # noqa: E402

UNITS = (1_000, 10_000, 100_000)
TURNS = 3
REPEATS = 2


def trivial(number: int) -> int:
    return number


@contextmanager
def cluster_of(workers: int) -> Iterator[str]:
    """The address of a cluster of so many processors, on this machine."""
    # by default whatever else runs here comes before Ray's workers, and not before the run without Ray
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False})
    try:
        yield made.address
    finally:
        made.shutdown()


def row(what: str, workers: int, units: int, seconds: float) -> dict[str, Any]:
    found = {"what": what, "workers": workers, "units": units, "s": seconds, "ms_per_unit": 1e3 * seconds / units}
    print(
        f"{what:10} {workers} workers  {units:7} units  {seconds:7.2f} s  {found['ms_per_unit']:.3f} ms/unit",
        flush=True,
    )
    return found


def measure_trivial(counts: list[int], workers: int, address: str) -> Iterator[dict[str, Any]]:
    with ray_executor.cluster(ray_executor.Ray(address)) as found:
        list(ray_executor.results(trivial, range(100), found))  # workers are up
        for count in counts:
            begun_s = time.perf_counter()
            assert sum(ray_executor.results(trivial, range(count), found)) == count * (count - 1) // 2
            yield row("trivial", workers, count, time.perf_counter() - begun_s)


def measure_simulated(workers: int, address: str) -> dict[str, Any]:
    """Without what is not a unit's, the start of Ray and of what workers compile: two sizes, each large enough for
    both, and the difference of their least times."""
    main = experiment.load("main")
    schemes = (Scheme("cachegen", "kvstream", depth=1), Scheme("kvstream", "kvstream"), Scheme("mpc", "kvstream"))
    seconds, units = [], []
    for repetitions in (5, 13):
        made = replace(main, schemes=schemes, repetitions=repetitions, baseline="", simulated_repetitions=0)
        took_s = []
        for _ in range(REPEATS):
            with tempfile.TemporaryDirectory() as folder:
                on = ray_executor.Ray(address) if workers else None
                begun_s = time.perf_counter()
                simulated.run_simulated(made, Run(Path(folder)), quiet=True, on=on)
                took_s.append(time.perf_counter() - begun_s)
        seconds.append(min(took_s))
        units.append(len(made.units()))
    return row("simulated" if workers else "no Ray", workers, units[1] - units[0], seconds[1] - seconds[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=list(UNITS))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    added_ms, ratios = [], []
    for _ in range(TURNS):
        turn = [measure_simulated(0, "")]
        for workers in (1, 2):
            with cluster_of(workers) as address:
                turn.append(measure_simulated(workers, address))
        alone, one, two = (found["ms_per_unit"] for found in turn)
        added_ms.append(one - alone)
        ratios.append(one / two)
        rows += turn
    with cluster_of(2) as address:
        rows += measure_trivial(options.units, 2, address)
    print(f"Ray adds {median(added_ms):.1f} ms to a unit; two workers are {median(ratios):.2f}x as fast as one")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows} | machine.describe(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
