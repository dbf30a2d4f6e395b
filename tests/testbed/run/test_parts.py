"""Parts of a run that travel between machines; on a Ray cluster in tests/emulation/test_ray.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstream.testbed.config import experiment
from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.folder import SIMULATED, Run
from kvstream.testbed.run import parts
from kvstream.testbed.run.ray_executor import Ray
from kvstream.testbed.run.shards import WHOLE, Shard
from kvstream.testbed.run.simulated import run_simulated

EXPERIMENT = experiment.from_dict(
    {
        "name": "x",
        "contexts": ["docs"],
        "traces": ["steady,scale_mean=60Mbps", "wifi,scale_mean=60Mbps"],
        "deadlines_s": [0.6, 0.8],
        "schemes": [{"policy": "throughput", "codec": "uniform"}, {"policy": "cachegen", "codec": "uniform"}],
    }
)


def ran(path: Path, shard: Shard = WHOLE) -> Run:
    run = Run(path)
    run_simulated(EXPERIMENT, run, quiet=True, shard=shard)
    return run


def test_parts_from_elsewhere_make_the_run_in_one_go(tmp_path: Path) -> None:
    whole, joined = ran(tmp_path / "whole"), Run(tmp_path / "joined")
    for number in (2, 1):
        shard = Shard(number, 2)
        assert parts._is_open(EXPERIMENT, joined, shard)
        parts._absorb(parts._packed(ran(tmp_path / str(number), shard).path), joined)
        assert not parts._is_open(EXPERIMENT, Run(joined.path), shard)
    whole.rebuild(), joined.rebuild()
    for name in ("sessions.jsonl", "chunks.jsonl"):
        assert (whole.path / name).read_bytes() == (joined.path / name).read_bytes()


def test_a_part_brings_the_simulated_run_beside_it_too(tmp_path: Path) -> None:
    source, into = ran(tmp_path / "source"), Run(tmp_path / "into")
    ran(source.path / SIMULATED)
    parts._absorb(parts._packed(source.path), into)
    assert len(into.rebuild()) == len(Run(into.path / SIMULATED).rebuild()) == 8


def test_what_is_done_travels_to_the_part_and_is_not_run_again(tmp_path: Path) -> None:
    before = ran(tmp_path / "before", Shard(1, 2))
    parts._unpack(parts._packed(before.path), tmp_path / "there")
    stamps = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "there" / "cells").iterdir()}
    ran(tmp_path / "there")
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "there" / "cells").iterdir()}
    assert stamps.items() < now.items()


def test_a_shard_is_not_shared_out_again(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="omit --shard"):
        parts.run_on_cluster(EXPERIMENT, Run(tmp_path), quiet=True, shard=Shard(1, 2), on=Ray())
