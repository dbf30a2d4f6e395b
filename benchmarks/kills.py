"""Runs that lose a process at a random moment, to SIGKILL: what is left of them?

    python benchmarks/kills.py [--runs 200] [--seed 1] [--out FILE.json]

Each is a real run (every tenth a whole `kvstream run` with sender, receiver, model, recorders and probe, the others a
replayed trace with delay and cross traffic), of which one process, whichever, is killed at a moment
drawn evenly from its life. Within 2 s of the run's end nothing of it may be there: no process, no namespace, no
interface, no mount, no file in its temporary folder, no rule on the host. Only what carries the run's own mark is
looked at, so other work on the machine does not matter. 200 runs take about 8 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from testbed.emulator.turn import LOCK  # noqa: E402

REPLAY = ("trace", "replay", "constant,rate=20Mbps", "--length", "1s", "--measure")
REPLAY_LINK = ("--link", "delay=5ms,cross_flows=1")
SESSION = (
    *("run", "--quick", "--capture", "--probe", "--policy", "fixed,level=lowest", "--codec", "uniform"),
    *("--trace", "constant,rate=30Mbps", "--link", "delay=5ms"),
)
EVERY = 10
"""One run in so many is a whole experiment."""
LIFE_S = {"replay": 2.5, "session": 12.0}
"""Killed within so long from the start; a run that is over by then had none of its processes killed."""
GONE_S = 2.0
HUNG_S = 120.0
"""A run that lost a process it can do without goes on: a whole experiment takes 40 s on a busy machine."""
KEPT = (LOCK.name, "torchinductor_")
"""An empty file that all emulations share, and torch's folder of compiled code: left by every run, killed or not."""


@dataclass(frozen=True)
class Killed:
    """One run, and what was found after it."""

    number: int
    kind: str
    at_s: float
    victim: str
    """Command line of the process that was killed; empty when the run was over."""
    status: int | None
    """Exit status of the run; None when it hung."""
    cleanup_s: float
    """From the run's end until none of its processes was there."""
    left: tuple[str, ...]


def one(number: int, seed: int) -> Killed:
    """Start a run, kill one process of it, and look."""
    draw = random.Random(f"{seed}/{number}")
    kind = "session" if number % EVERY == EVERY - 1 else "replay"
    mark = f"KVSTREAM_KILL_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="kvstream-kills-") as folder:
        temporary = Path(folder, "tmp")
        temporary.mkdir()
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {mark: "1", "PYTHONPATH": paths, "TMPDIR": str(temporary)}
        words = (*SESSION, "--runs", str(Path(folder, "runs"))) if kind == "session" else (*REPLAY, *REPLAY_LINK)
        links = set(os.listdir("/sys/class/net"))
        process = subprocess.Popen(
            [sys.executable, "-m", "testbed.cli", *words],
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        at_s = draw.uniform(0.02, LIFE_S[kind])
        time.sleep(at_s)
        spaces, looked_s, victim = namespaces(mark), time.clock_gettime(time.CLOCK_BOOTTIME), ""
        victims = marked(mark)
        if process.poll() is None and victims:
            pid = draw.choice(victims)
            with contextlib.suppress(OSError):  # it may end by itself at this very moment
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                victim = words.replace(sys.executable, "python").replace(str(ROOT), ".")[:200]
                os.kill(pid, signal.SIGKILL)
        status = ended(process)
        end_s = time.monotonic()
        # A process that is on its way out has no environment any more, but its namespace still.
        while (marked(mark) or spaces & held(looked_s)) and time.monotonic() - end_s < GONE_S:
            time.sleep(0.005)
        cleanup_s = time.monotonic() - end_s
        left = [f"process {pid}" for pid in marked(mark)]
        left += [f"namespace {name}" for name in sorted(spaces & held(looked_s))]
        left += [f"interface {name}" for name in sorted(set(os.listdir("/sys/class/net")) - links)]
        left += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if folder in line]
        left += [f"file {path.name}" for path in temporary.iterdir() if not path.name.startswith(KEPT)]
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    return Killed(number, kind, at_s, victim, status, cleanup_s, tuple(left))


def ended(process: subprocess.Popen[bytes]) -> int | None:
    """Wait for a run; None, and it is killed, when it hangs."""
    try:
        return process.wait(timeout=HUNG_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def marked(mark: str) -> list[int]:
    """Processes with a mark in their environment, wherever they are."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
    return sorted(found)


def namespaces(mark: str) -> set[str]:
    """Namespaces of a run's processes that are not this process's own."""
    found = set()
    for pid in marked(mark):
        found |= of_process(str(pid))
    return found - of_process("self")


def held(before_s: float) -> set[str]:
    """Namespaces that a mount keeps, or a process that is older than `before_s` (CLOCK_BOOTTIME).

    A younger process may be in a namespace that was given the number of one that is gone.
    """
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                state, *facts = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                # A zombie holds nothing any more; an orphan's is the business of the machine's first process.
                if state != "Z" and int(facts[18]) / os.sysconf("SC_CLK_TCK") < before_s:
                    found |= of_process(name)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        found |= {word for word in line.split() if word.startswith(("net:[", "mnt:[", "user:["))}
    return found


def of_process(pid: str) -> set[str]:
    found = set()
    for kind in ("net", "mnt", "pid", "ipc", "user"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def rules() -> str:
    """The host's packet filter as far as this user may see it."""
    done = subprocess.run(["iptables", "-S"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    before, begin_s = rules(), time.monotonic()
    found = []
    for number in range(options.runs):
        found.append(one(number, options.seed))
        if found[-1].left or found[-1].status is None:
            print(f"run {number} ({found[-1].kind}), {found[-1].victim!r} killed: {found[-1]}", flush=True)
    killed = [run for run in found if run.victim]
    summary = {
        "runs": len(found),
        "killed": len(killed),
        "of_sessions": sum(run.kind == "session" for run in killed),
        "left": sum(bool(run.left) for run in found) + (rules() != before),
        "hung": sum(run.status is None for run in found),
        "slowest_cleanup_s": max(run.cleanup_s for run in found),
        "took_s": time.monotonic() - begin_s,
    }
    print(json.dumps(summary, indent=1))
    names = Counter(" ".join(run.victim.split()[1:4]) or run.victim for run in killed)
    print("killed: " + ", ".join(f"{count} x {name}" for name, count in names.most_common()))
    if options.out:
        options.out.write_text(json.dumps({**summary, "each": [asdict(run) for run in found]}, indent=1) + "\n")
    return 1 if summary["left"] or summary["hung"] else 0


if __name__ == "__main__":
    sys.exit(main())
