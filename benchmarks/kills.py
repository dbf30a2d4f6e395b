"""What is left behind by commands that lose a process to SIGKILL at a random moment, and does the next one go on?

    python benchmarks/kills.py [--runs 200] [--stores 40] [--setups 10] [--seed 1] [--out FILE.json]

Each is a real run (every tenth a whole `kvstream run` with sender, receiver, model, recorders and probe, the others a
replayed trace with delay and cross traffic), of which one random process is killed at a moment
drawn uniformly from its life. Within 2 s of the run's end nothing of it may be left: no process, no namespace, no
interface, no mount, no file in its temporary folder, no rule on the host. Only what carries the run's own mark is
looked at, so other work on the machine does not matter. 200 runs take about 8 minutes on two cores.

Of `kvstream store` and `./run_testbed.sh setup` (in an environment of its own) one process is killed likewise, and all
others a moment later, as a machine that loses its power does. The same command must then end well, and what it made
must work: the context is listed and its chunks pass their checks, the environment runs `kvstream`. A store takes some
20 seconds, a set-up some five minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.testbed.emulator.lock import LOCK  # noqa: E402

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
STORE = ("store", "docs", "--codec", "kvstream", "--to", "contexts")
AGAIN_S = {"store": 12.0, "setup": 150.0}
"""The same for the commands that are repeated."""
ENDED_S = {"store": 300.0, "setup": 1200.0}
"""The next one has ended by then."""
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
            [sys.executable, "-m", "kvstream.testbed.cli", *words],
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


@dataclass(frozen=True)
class Repeated:
    """A command that was killed, and how the same one ended after it."""

    kind: str
    at_s: float
    victim: str
    found: tuple[str, ...]
    """What was wrong after the second."""


def again(kind: str, number: int, seed: int) -> Repeated:
    """Kill a command at a moment and give it again."""
    draw = random.Random(f"{seed}/{kind}/{number}")
    mark = f"KVSTREAM_KILL_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="kvstream-kills-") as folder:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {mark: "1", "PYTHONPATH": paths}
        cli = [sys.executable, "-m", "kvstream.testbed.cli"]
        command = [*cli, *STORE]
        if kind == "setup":
            environment |= {"KVSTREAM_VENV": f"{folder}/venv", "XDG_CACHE_HOME": f"{folder}/cache"}
            command = [str(ROOT / "run_testbed.sh"), "setup"]
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        at_s = draw.uniform(0.02, AGAIN_S[kind])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(at_s)
        victim, victims = "", marked(mark)
        for pid in draw.sample(victims, len(victims)):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                victim = victim or words.replace(sys.executable, "python").replace(str(ROOT), ".")[:200]
                os.kill(pid, signal.SIGKILL)
        process.wait()
        checks = [command]
        if kind == "setup":
            checks += [[f"{folder}/venv/bin/kvstream", "policy", "list"]]
        found = []
        for check in checks:
            words = " ".join(check)[-40:]
            try:
                done = subprocess.run(
                    check,
                    env=environment,
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=ENDED_S[kind],
                )
            except subprocess.TimeoutExpired:
                for pid in marked(mark):
                    os.kill(pid, signal.SIGKILL)
                found.append(f"{words}: has not ended after {ENDED_S[kind]:g} s")
                break
            if done.returncode:
                found.append(f"{words}: {done.returncode}: {done.stderr[-200:]}")
        if kind == "store" and not found:
            found += unsound(Path(folder, "contexts"))
    return Repeated(kind, at_s, victim, tuple(found))


def unsound(store: Path) -> list[str]:
    """What is in a store but no whole context."""
    from kvstream.policies.api import TEXT
    from kvstream.testbed.store.store import Store

    opened = Store(store)
    contexts = list(opened.stamps())
    found = [] if len(contexts) == 1 else [f"contexts {contexts}"]
    for context in contexts:
        entry = opened.entry(context)
        opened.check(entry)
        for name, digest in entry.hashes.items():
            chunk, _, level = name.partition("/")
            data = opened.read(entry, int(chunk), level if level == TEXT else int(level))
            if hashlib.sha256(data).hexdigest() != digest:
                found.append(f"chunk {name} is damaged")
    return found


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
    parser.add_argument("--stores", type=int, default=40)
    parser.add_argument("--setups", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    summary = runs(options.runs, options.seed) if options.runs else {}
    repeated = [again("store", number, options.seed) for number in range(options.stores)]
    for number in range(options.setups):
        repeated.append(again("setup", number, options.seed))
        print(
            f"set-up killed after {repeated[-1].at_s:.0f} s: {repeated[-1].found or 'the next one is whole'}",
            flush=True,
        )
    for kind in ("store", "setup"):
        killed = [one for one in repeated if one.kind == kind and one.victim]
        bad = [one for one in repeated if one.kind == kind and one.found]
        summary[f"{kind}s killed"], summary[f"{kind}s not mended"] = len(killed), len(bad)
        print(f"{kind}: {len(killed)} killed, {len(bad)} not mended by the next", *bad, sep="\n", flush=True)
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.is_file() else {}
        summary["repeated"] = [*map(asdict, repeated)] or before.get("repeated", [])
        options.out.write_text(json.dumps(before | summary, indent=1) + "\n")
    return 1 if summary.get("left") or summary.get("hung") or any(one.found for one in repeated) else 0


def runs(count: int, seed: int) -> dict[str, Any]:
    """Runs of the emulator, of which one process is killed."""
    before, begin_s = rules(), time.monotonic()
    found = []
    for number in range(count):
        found.append(one(number, seed))
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
    return {**summary, "each": [asdict(run) for run in found]}


if __name__ == "__main__":
    sys.exit(main())
