"""A sandbox is apart from the host, ends as its command does, and dies with any of its processes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from testbed.emulator import sandbox, turn
from testbed.errors import MachineError

ROOT = Path(__file__).parents[2]
RUN = "import sys; from testbed.emulator import sandbox; sys.exit(sandbox.run(sys.argv[1:]))"


def output(argv: list[str]) -> str:
    """What a sandboxed command prints."""
    done = subprocess.run([sys.executable, "-c", RUN, *argv], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137), (["no-such-program"], 127)],
)
def test_the_status_is_the_command_s(argv, status):
    assert sandbox.run(argv) == status


def test_it_is_apart_from_the_host():
    assert not sandbox.inside()
    here = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt", "pid", "ipc")}
    there = dict(
        line.split("=")
        for line in output(
            ["sh", "-c", "for k in net mnt pid ipc; do echo $k=$(readlink /proc/self/ns/$k); done"]
        ).split()
    )
    assert all(there[kind] != here[kind] for kind in here)
    assert output(["sh", "-c", "id -u; cat /proc/net/dev | grep -c :"]).split() == ["0", "1"]
    assert output([sys.executable, "-c", "from testbed.emulator import sandbox; print(sandbox.inside())"]) == "True\n"


def test_the_environment_alone_does_not_make_a_sandbox(monkeypatch):
    monkeypatch.setenv(sandbox.MARK, "1")
    assert not sandbox.inside()


def test_a_sandbox_has_no_zombies():
    script = "(sleep 0.05 &) ; (sleep 0.05 &) ; sleep 0.3; grep -l 'State:.Z' /proc/[0-9]*/status || true"
    assert output(["sh", "-c", script]) == ""


def marked(mark: str) -> list[int]:
    """Processes that have a mark in their environment, wherever they are."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return met


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command(number):
    script = (
        "import time\ntry:\n    print('up', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise SystemExit(42)"
    )
    # A job that a shell put into the background, as CI may, ignores Ctrl-C: not what is tested here.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    with subprocess.Popen(
        [sys.executable, "-c", heed + RUN, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == (42 if number == signal.SIGINT else 128 + signal.SIGTERM)


@pytest.mark.parametrize("seed", range(10))
def test_killing_any_process_leaves_nothing(seed, tmp_path):
    """One process of a running emulation is killed at a random moment: with it, or soon after it, all are gone."""
    draw = random.Random(seed)
    mark = f"KVSTREAM_TEST_{uuid.uuid4().hex}"
    settings = '{"rows": [[9, 20]], "length_s": 2.0, "link": "delay=5ms"}'
    scenario = [str(Path(__file__).with_name("scenarios.py")), str(tmp_path / "out.json"), "replay", settings]
    links = set(os.listdir("/sys/class/net"))
    files = set(os.listdir("/tmp"))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, sys.executable, *scenario],
        cwd=ROOT,
        env=os.environ | {mark: "1", "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")},
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(draw.uniform(0.05, 2.0))
        # The victim may have ended by itself meanwhile; and one that the run can do without lets it end as usual.
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(marked(mark) or [process.pid]), signal.SIGKILL)
        process.wait(timeout=30)
        assert wait_for(lambda: not marked(mark), 2.0), f"still there: {marked(mark)}"
    finally:
        process.kill()
        process.wait()
    assert set(os.listdir("/sys/class/net")) == links
    left = {name for name in set(os.listdir("/tmp")) - files if "mininet" in name or "kvstream" in name}
    assert left <= {turn.LOCK.name}  # an empty file that all runs share


@pytest.mark.parametrize(
    ("files", "number", "words"),
    [
        ({"MAX_USER_NAMESPACES": "0"}, errno.ENOSPC, "sysctl -w user.max_user_namespaces"),
        ({"DEBIAN_SWITCH": "0"}, errno.EPERM, "sysctl -w kernel.unprivileged_userns_clone=1"),
        ({"APPARMOR_SWITCH": "1"}, errno.EPERM, "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        ({}, errno.EPERM, "as root"),
    ],
)
def test_a_refusal_names_the_cause_and_the_remedy(files, number, words, tmp_path, monkeypatch):
    for name in ("MAX_USER_NAMESPACES", "DEBIAN_SWITCH", "APPARMOR_SWITCH"):
        (tmp_path / name).write_text(files.get(name, "1" if name == "DEBIAN_SWITCH" else ""))
        monkeypatch.setattr(sandbox, name, tmp_path / name)
    monkeypatch.setattr(sandbox, "_in_container", lambda: False)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    line = sandbox._explain(OSError(number, os.strerror(number), "unshare"))
    assert words in line
    assert "\n" not in line


def test_docker_is_told_apart(monkeypatch):
    monkeypatch.setattr(sandbox, "_in_container", lambda: True)
    monkeypatch.setattr(sandbox, "MAX_USER_NAMESPACES", Path("/nonexistent"))
    monkeypatch.setattr(sandbox, "DEBIAN_SWITCH", Path("/nonexistent"))
    assert "--security-opt seccomp=unconfined" in sandbox._explain(OSError(errno.EPERM, "Operation not permitted"))


def test_a_machine_without_namespaces_gets_one_clear_line():
    """For real: in a user namespace whose own limit is 0, nothing can be unshared."""
    script = (
        "echo 0 > /proc/sys/user/max_user_namespaces && echo 0 > /proc/sys/user/max_net_namespaces && "
        f"exec '{sys.executable}' -c \"from testbed.emulator import sandbox; print(sandbox.available())\""
    )
    inner = ["unshare", "--user", "--map-root-user", "--mount-proc", "--pid", "--fork", "sh", "-c", script]
    done = subprocess.run(inner, capture_output=True, text=True, cwd=ROOT, check=False)
    if "unshare" in done.stderr or "annot" in done.stderr:
        pytest.skip(f"no user namespace to try this in: {done.stderr.strip()}")
    assert "user.max_user_namespaces is 0; run `sudo sysctl -w user.max_user_namespaces" in done.stdout


def test_nothing_to_run_is_an_error():
    with pytest.raises(ValueError, match="argv is empty"):
        sandbox.run([])


def test_refusal_is_a_machine_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_LAUNCH", "import os, sys; os.write(int(sys.argv[2]), b'no room')")
    with pytest.raises(MachineError, match="no room"):
        sandbox.run(["true"])
