"""A sandbox is apart from the host, ends as its command does, and dies with any of its processes."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstream.testbed.emulator import doctor, sandbox
from kvstream.testbed.errors import MachineError

ROOT = Path(__file__).parents[2]
RUN = "import sys; from kvstream.testbed.emulator import sandbox; sys.exit(sandbox.run(sys.argv[1:]))"


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


@pytest.mark.parametrize(
    ("name", "status", "says"), [("nothing", 127, "may not be searched"), ("plain", 126, "denied")]
)
def test_a_closed_folder_of_path_hides_nothing_else(name, status, says, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    (tmp_path / "plain").touch()
    monkeypatch.setenv("PATH", f"{closed}:{tmp_path}")
    monkeypatch.setattr(sandbox, "_searchable", lambda folder: folder != str(closed))  # root searches everything
    found, why = sandbox._refused(name, PermissionError(errno.EACCES, "Permission denied"))
    assert (found, says in why) == (status, True)
    assert (str(closed) in why) == (name == "nothing")


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
    assert (
        output([sys.executable, "-c", "from kvstream.testbed.emulator import sandbox; print(sandbox.inside())"])
        == "True\n"
    )


def test_the_environment_alone_does_not_make_a_sandbox(monkeypatch):
    monkeypatch.setenv(sandbox.MARK, "1")
    assert not sandbox.inside()


def test_a_sandbox_has_no_zombies():
    script = "(sleep 0.05 &) ; (sleep 0.05 &) ; sleep 0.3; grep -l 'State:.Z' /proc/[0-9]*/status || true"
    assert output(["sh", "-c", script]) == ""


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


def test_killing_any_process_leaves_nothing(tmp_path):
    """Ten runs, one process of each killed at a random moment: the short form of the benchmark, which says more."""
    out = tmp_path / "kills.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--runs", "10", "--stores", "0", "--setups", "0"]
    command += ["--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(out.read_text())
    assert (summary["runs"], summary["left"], summary["hung"]) == (10, 0, 0)
    assert summary["killed"] >= 8


CONTAINED = {"MOUNTS": "21 1 0:27 / / rw - overlay overlay rw,lowerdir=/a", "APPARMOR_SWITCH": "1"}


@pytest.mark.parametrize(
    ("files", "number", "words"),
    [
        ({"MAX_USER_NAMESPACES": "0"}, errno.ENOSPC, "sysctl -w user.max_user_namespaces"),
        ({"DEBIAN_SWITCH": "0"}, errno.EPERM, "sysctl -w kernel.unprivileged_userns_clone=1"),
        ({"APPARMOR_SWITCH": "1"}, errno.EPERM, "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        ({"STATUS": "Seccomp:\t2\n"}, errno.EPERM, "--security-opt seccomp=unconfined"),
        ({"MOUNTS": CONTAINED["MOUNTS"]}, errno.EPERM, "--security-opt systempaths="),
        (CONTAINED | {"STATUS": "Seccomp:\t2\n"}, errno.EPERM, "--security-opt systempaths="),
        (CONTAINED | {"STATUS": "Seccomp:\t0\n"}, errno.EPERM, "=0` on the container's host"),
        ({}, errno.EPERM, "as root"),
    ],
)
def test_a_refusal_names_the_cause_and_the_remedy(files, number, words, tmp_path, monkeypatch):
    for name in ("MAX_USER_NAMESPACES", "DEBIAN_SWITCH", "APPARMOR_SWITCH", "STATUS", "MOUNTS"):
        (tmp_path / name).write_text(files.get(name, "1" if name == "DEBIAN_SWITCH" else ""))
        monkeypatch.setattr(sandbox, name, tmp_path / name)
    real = sandbox._reads
    monkeypatch.setattr(sandbox, "_reads", lambda path: None if path == Path("/proc/1/cgroup") else real(path))
    monkeypatch.setattr(Path, "exists", lambda path: False)  # /.dockerenv, where these tests run in a container
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    line = sandbox._explain(OSError(number, os.strerror(number), "unshare"))
    assert words in line
    assert "\n" not in line
    assert words.partition("`")[0] in doctor._line_of(line) or words == "as root"


def test_a_mount_that_a_container_forbids_is_no_matter_of_apparmor_s_switch(tmp_path, monkeypatch):
    (tmp_path / "switch").write_text("1")
    monkeypatch.setattr(sandbox, "APPARMOR_SWITCH", tmp_path / "switch")
    monkeypatch.setattr(sandbox, "STATUS", tmp_path / "none")
    monkeypatch.setattr(sandbox, "_in_container", lambda: True)
    line = sandbox._explain(OSError(errno.EPERM, "Operation not permitted", "mount proc on /proc"))
    assert "--security-opt systempaths=unconfined" in line


def test_docker_is_told_apart(monkeypatch):
    monkeypatch.setattr(sandbox, "_in_container", lambda: True)
    monkeypatch.setattr(sandbox, "MAX_USER_NAMESPACES", Path("/nonexistent"))
    monkeypatch.setattr(sandbox, "DEBIAN_SWITCH", Path("/nonexistent"))
    monkeypatch.setattr(sandbox, "APPARMOR_SWITCH", Path("/nonexistent"))
    assert "--security-opt seccomp=unconfined" in sandbox._explain(OSError(errno.EPERM, "Operation not permitted"))


def test_a_machine_without_namespaces_gets_one_clear_line():
    """For real: in a user namespace whose own limit is 0, nothing can be unshared."""
    script = (
        "echo 0 > /proc/sys/user/max_user_namespaces && echo 0 > /proc/sys/user/max_net_namespaces && "
        f"exec '{sys.executable}' -c \"from kvstream.testbed.emulator import sandbox; print(sandbox.available())\""
    )
    inner = ["unshare", "--user", "--map-root-user", "--mount-proc", "--pid", "--fork", "sh", "-c", script]
    done = subprocess.run(inner, capture_output=True, text=True, cwd=ROOT, check=False)
    if "unshare" in done.stderr or "annot" in done.stderr:
        pytest.skip(f"no user namespace to try this in: {done.stderr.strip()}")
    assert "user.max_user_namespaces is 0; run `sudo sysctl -w user.max_user_namespaces" in done.stdout


SECCOMP = """
import ctypes, platform, struct
unshare = {"x86_64": 272, "aarch64": 97}[platform.machine()]
# load the system call's number; is it unshare? then EPERM, else allow: what Docker's profile does with it
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, unshare), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
from kvstream.testbed.emulator import doctor
found = doctor.probe()[-1]
print(found.name, found.ok, found.fix)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the number of the system call differs")
def test_a_filter_like_docker_s_is_recognised_for_real():
    done = subprocess.run([sys.executable, "-c", SECCOMP], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("namespaces False --security-opt seccomp=unconfined")


def test_nothing_to_run_is_an_error():
    with pytest.raises(ValueError, match="argv is empty"):
        sandbox.run([])


def test_refusal_is_a_machine_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_LAUNCH", "import os, sys; os.write(int(sys.argv[2]), b'no room')")
    with pytest.raises(MachineError, match="no room"):
        sandbox.run(["true"])
