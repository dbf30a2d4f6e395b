"""Two runs in one folder: the second is refused, and a dead one keeps nobody out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.claim import claimed

ROOT = Path(__file__).resolve().parents[3]
HOLD = "import sys; from pathlib import Path; from kvstream.testbed.results.claim import claimed\n" \
       "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip


def test_a_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "x")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(SpecError, match=rf"another run is writing here \(process {holder.pid}\)"),
            claimed(tmp_path / "x"),
        ):
            pass
        with claimed(tmp_path / "y"):
            pass
        holder.send_signal(signal.SIGKILL)
    with claimed(tmp_path / "x"):
        pass


def test_the_command_is_refused_beside_a_running_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstream.testbed.cli", "simulate", "--quick", "--name", "x", "--fresh"]
    with claimed(tmp_path / "x-quick"):
        done = subprocess.run(
            [*command, "--runs", str(tmp_path)], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr


@pytest.mark.parametrize(
    ("held", "wanted", "free"),
    [("1-of-2", "2-of-2", True), ("1-of-2", "1-of-2", False), ("1-of-2", "", False), ("", "1-of-2", False)],
)
def test_shards_write_one_folder_and_nobody_else_does(tmp_path: Path, held: str, wanted: str, free: bool) -> None:
    with claimed(tmp_path / "x", held):
        if free:
            with claimed(tmp_path / "x", wanted):
                pass
        else:
            with pytest.raises(SpecError, match="another run is writing here"), claimed(tmp_path / "x", wanted):
                pass
