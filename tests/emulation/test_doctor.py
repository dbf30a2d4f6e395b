"""The doctor tries everything out, and names a fix for what fails."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from kvstream.testbed.emulator import doctor
from kvstream.testbed.emulator.lock import LOCK

ROOT = Path(__file__).parents[2]


def test_what_the_doctor_finds_is_what_links_need():
    checks = {check.name: check for check in doctor.probe()}
    for name in ("namespaces", "veth", "htb, tbf, bfifo", "Mininet", "congestion controls"):
        assert checks[name].ok, checks[name].detail
    assert checks["netem"].ok or checks["NFQUEUE"].ok
    assert all(check.fix for check in checks.values() if not check.ok)
    assert doctor.status(list(checks.values())) == 0
    json.dumps([dataclasses.asdict(check) for check in checks.values()])


def test_a_missing_program_is_named_with_its_package(tmp_path, monkeypatch, capsys):
    for program in ("python3", "true", "timeout", "env", "bash", "which"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sandbox, "SYSTEM_FOLDERS", ())
    checks = doctor._programs()
    missing = {check.name: check for check in checks if not check.ok}
    assert missing["tc"].fix == "sudo apt-get install --no-install-recommends iproute2"
    assert doctor.status(list(missing.values())) == 4
    doctor.show(list(missing.values()))
    assert "Emulated runs do not work here yet" in capsys.readouterr().out


def test_without_namespaces_the_doctor_says_why(monkeypatch):
    monkeypatch.setattr(doctor.sandbox, "available", lambda: "AppArmor forbids it; run `sudo this`, or as root")
    found = doctor.probe()[-1]
    assert (found.name, found.ok) == ("namespaces", False)
    assert "AppArmor forbids it" in found.detail
    assert found.fix == "sudo this"
    assert doctor.status([found]) == 4


def test_the_inside_alone_makes_its_own_sandbox():
    """It adds interfaces, queues and rules: never to the host."""
    command = [sys.executable, "-m", "kvstream.testbed.emulator.doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        seen: set[str] = set()
        while process.poll() is None:
            seen |= set(os.listdir("/sys/class/net"))
            time.sleep(0.002)
        found = json.loads(process.stdout.read())
    assert process.returncode == 0
    assert "veth" in {check["name"] for check in found}
    assert not {name for name in seen if name.startswith("probe")}


def test_another_emulation_s_turn_is_no_fault():
    if not LOCK.exists():  # else it may be another user's
        LOCK.touch()
    with LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        checks = {check.name: check for check in doctor.probe()}
    found = checks["Mininet"]
    assert (found.detail, found.fix) == (
        "not tried: another emulation is running here",
        "try again when it has ended",
    )
    assert doctor.status(list(checks.values())) == 0


def test_the_command_prints_json():
    done = subprocess.run(
        [sys.executable, "-m", "kvstream.testbed.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert {"name", "ok", "detail", "fix", "needed"} == set(json.loads(done.stdout)[0])
