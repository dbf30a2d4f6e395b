"""Any program at the end of a link: `kvstream trace replay TRACE -- COMMAND...`, as its users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCH = """
import os, sys, urllib.request
sys.exit(len(urllib.request.urlopen(os.environ["KVSTREAM_URL"] + "/file").read()) // 10**5)
"""
SERVE = """
import socket, sys, time
listener = socket.create_server(("", 7000))
peer, _ = listener.accept()
peer.sendall(bytes(400_000))
"""
TAKE = """
import os, socket
line = socket.create_connection((os.environ["KVSTREAM_SENDER"], 7000))
received = 0
while block := line.recv(1 << 16):
    received += len(block)
print(received, os.environ["KVSTREAM_RECEIVER"], "KVSTREAM_URL" in os.environ)
"""


def replay(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "kvstream.testbed.cli", "trace", "replay", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_download_takes_what_the_trace_allows_and_its_status_is_its_own(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1_200_000))
    done = replay(tmp_path, "constant,rate=5Mbps", "--json", "--", sys.executable, "-c", FETCH)
    found = json.loads(done.stdout)
    assert done.returncode == found["status"] == 12, "the command's own, whatever the link did"
    full_s = found["verdict"]["full_s"]  # from when Python had started and asked
    assert full_s == pytest.approx(1_200_000 * 8 / (5e6 * 1448 / 1514), rel=0.1)
    assert found["seconds"] > 0.9 * full_s
    assert found["verdict"]["state"] in ("valid", "invalid")
    assert found["verdict"]["coverage"] > 0.5
    assert found["verdict"]["delivered_bytes"] > 1_200_000


def test_a_server_of_ones_own_runs_at_the_other_end(tmp_path):
    (tmp_path / "serve.py").write_text(SERVE)
    words = ("constant,rate=20Mbps", "--link", "delay=5ms", "--both", f"{sys.executable} serve.py")
    done = replay(tmp_path, *words, "--", sys.executable, "-c", TAKE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "400000 10.2.0.2 False\n"
    assert "ended with status 0 after" in done.stderr
    assert "kvstream: link " in done.stderr


def test_what_takes_too_long_is_stopped_and_what_is_missing_is_named(tmp_path):
    done = replay(tmp_path, "steady", "--length", "500ms", "--", "sleep", "30")
    assert done.returncode == 124
    assert "was stopped: it took too long" in done.stderr
    done = replay(tmp_path, "steady", "--", "no-such-program-here")
    assert done.returncode == 2
    assert done.stderr == "kvstream: no-such-program-here: no such program; install it, or give its path\n"
    done = replay(tmp_path, "steady", "--both", "false", "--", "true")
    assert done.returncode == 4
    assert "the server `false` ended with status 1 before it began" in done.stderr
