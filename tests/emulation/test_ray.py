"""A run over emulated links in parts on a Ray cluster of two machines, each with the resource of a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstream.testbed.cli import main
from kvstream.testbed.results.folder import Run
from kvstream.testbed.run.ray_executor import LINK

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvstream-testbed[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

SPEC = """
contexts = ["docs"]
traces = ["constant,rate=30Mbps", "constant,rate=20Mbps"]
deadlines_s = [3.0]
links = ["delay=5ms,queue=512KiB"]
limits = {starved = 10.0, crowded = 100.0, gap_s = 1.0}

[[schemes]]
policy = "cachegen"
codec = "uniform"
"""


def test_parts_run_where_a_link_is_and_make_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(SPEC)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "resources": {LINK: 1}, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1, resources={LINK: 1})
        assert main(["run", "x.toml", "--executor", f"ray,address={cluster.address}"]) == 0
        said = capsys.readouterr().out
        assert "2 parts on 2 machines" in said
        rows = Run.open("runs/x").rows()
        assert [row["status"] for row in rows] == ["ok", "ok"]
        assert {row["backend"] for row in rows} == {"mininet"}
        assert main(["run", "x.toml", "--executor", f"ray,address={cluster.address}"]) == 0, "nothing is left to do"
        assert "0 parts" in capsys.readouterr().out
    finally:
        cluster.shutdown()


def test_a_cluster_without_a_link_is_told_how_to_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(SPEC)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        assert main(["run", "x.toml", "--executor", f"ray,address={cluster.address}"]) == 4, "what the machine lacks"
        assert "ray start --resources" in capsys.readouterr().err
    finally:
        cluster.shutdown()
