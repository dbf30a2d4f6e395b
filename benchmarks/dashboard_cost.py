"""What does the dashboard cost? The same sessions without it, with it, and with a browser open on it.

    python benchmarks/dashboard_cost.py [--repetitions N] [--out FILE.json]

A unit is a trace and a repetition; every arm runs on every unit, in shuffled order, over the same emulated link with
the same warm processes, at one fixed level so that nothing adapts. The arms:

    off        the receiver writes no events, no dashboard runs
    dashboard  the receiver writes events, the dashboard serves them, one client reads them
    browser    the same with a page open in headless Chromium, which draws on the processors of this very machine

Nothing is repeated: a session whose link deviated from its trace counts against its arm. TTFTs are compared over
the units whose sessions were valid in both arms, and over all units; the interval is over units. What else
runs on the machine makes sessions invalid in every arm, so its load is kept too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONTEXT, CODEC, CHUNK_TOKENS, POLICY = "docs", "kvstream", 256, "fixed,level=4"
TRACES = ("steady,scale_mean=13Mbps", "step,rates=18Mbps:4Mbps:20Mbps,hold=0.25s", "constant,rate=24Mbps")
ARMS = ("off", "dashboard", "browser")
SETTLE_S = 2.0
"""A browser is busy for a while after its page is there."""


def measure(folder: Path, repetitions: int, arms: list[str]) -> list[dict[str, Any]]:
    """Every unit in every arm. Runs inside a sandbox; `arrange` outside of it makes the arms."""
    from kvstream.testbed import events
    from kvstream.testbed.config import build
    from kvstream.testbed.config.experiment import Scheme, Unit
    from kvstream.testbed.emulator import fidelity
    from kvstream.testbed.encoding import prepare
    from kvstream.testbed.run.stage import open_stage
    from kvstream.traces.resolve import open_trace

    prepared = prepare.prepare("bundled", [CONTEXT], [CODEC], CHUNK_TOKENS, lambda line: print(line, file=sys.stderr))
    traces = {name: open_trace(name) for name in TRACES}
    scheme = Scheme(POLICY, CODEC, label="fixed")
    log = folder / events.FILE_NAME
    events.append(log, events.RunStart("cost", "mininet", ["fixed"], repetitions * len(TRACES) * len(arms)))
    order = random.Random(1)
    found = []
    with open_stage(build.make_link("queue=50ms"), list(traces.values()), prepared, folder) as stage:
        for repetition in range(repetitions):
            for number, (name, trace) in enumerate(traces.items()):
                index = repetition * len(TRACES) + number
                unit = Unit(index, CONTEXT, name, 0.0, 1.0, "queue=50ms", seed=1)
                for arm in order.sample(arms, len(arms)):
                    _want(folder, arm)
                    result = stage.session(
                        unit, scheme, trace, fidelity.Limits(), None if arm == "off" else log
                    ).outcome
                    kept = ("median_error", "total_error", "lateness_p99_s", "gap_s", "starved")
                    row = {"unit": index, "trace": name, "arm": arm, "status": result.status, "why": result.why}
                    row |= {"ttft_s": result.record["ttft_s"] if result.record else None}
                    row |= {key: result.fidelity[key] for key in kept}
                    found.append(row)
                    print(f"{index:3} {name[:30]:<30} {arm:<10} {row['ttft_s']:.3f} s  {result.status} {result.why}",
                          file=sys.stderr, flush=True)  # fmt: skip
    _want(folder, "end")
    return found


def _want(folder: Path, arm: str) -> None:
    """Ask for an arm and wait until it is there."""
    (folder / "want").write_text(arm)
    while arm != "end" and (not (folder / "have").is_file() or (folder / "have").read_text() != arm):
        time.sleep(0.02)


def arrange(folder: Path, over: threading.Event) -> None:
    """Outside the sandbox: start and stop what the measurement asks for."""
    from kvstream.testbed.dashboard.live import beside

    have = ""
    with contextlib.ExitStack() as stack:
        watching = stack.enter_context(contextlib.ExitStack())
        while not over.is_set():
            want = (folder / "want").read_text() if (folder / "want").is_file() else ""
            if want and want != have:
                watching.close()
                if want != "off" and want != "end":
                    url = watching.enter_context(beside(folder))
                    watching.enter_context(reader(url) if want == "dashboard" else browser(url))
                time.sleep(SETTLE_S)
                have = want
                (folder / "have.part").write_text(have)
                (folder / "have.part").replace(folder / "have")
            time.sleep(0.02)


@contextlib.contextmanager
def reader(url: str) -> Iterator[None]:
    """One client that reads the events."""
    response = urllib.request.urlopen(url + "events", timeout=30)

    def read() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed under its feet
            while response.readline():
                pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            response.fp.raw._sock.shutdown(2)  # type: ignore[union-attr]
        thread.join(5)


@contextlib.contextmanager
def browser(url: str) -> Iterator[None]:
    """A page in headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            window.new_page().goto(url)
            yield
        finally:
            window.close()


def chromium() -> str | None:
    import importlib.util
    import shutil

    found = shutil.which("chromium") or shutil.which("chromium-browser")
    return found if importlib.util.find_spec("playwright") else None


def judge(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an arm: valid sessions, what fidelity looks at, and TTFT against `off`."""
    import numpy as np

    table = []
    sessions = {(row["unit"], row["arm"]): row for row in found}
    for arm in dict.fromkeys(sorted((row["arm"] for row in found), key=ARMS.index)):
        rows = [row for row in found if row["arm"] == arm]
        pairs = [(row, sessions[row["unit"], "off"]) for row in rows]
        valid = [pair for pair in pairs if all(row["status"] == "ok" for row in pair)]
        answered = [pair for pair in pairs if all(row["ttft_s"] is not None for row in pair)]
        errors = [row["median_error"] for row in rows if row["median_error"] is not None]
        table.append(
            {
                "arm": arm,
                "sessions": len(rows),
                "valid": sum(row["status"] == "ok" for row in rows),
                "median_error": float(np.median(errors)) if errors else None,
                "lateness_p99_s": float(np.median([row["lateness_p99_s"] for row in rows])),
                "starved": float(np.median([row["starved"] for row in rows])),
                "ttft_s": float(np.median([row["ttft_s"] for row, _ in answered])) if answered else None,
                "slower_valid": None if arm == "off" else slower(valid),
                "slower_all": None if arm == "off" else slower(answered),
            }
        )
    return table


def slower(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Mean of an arm's TTFT minus that of `off`, seconds, with its interval."""
    from kvstream.testbed.results import stats

    watched, alone = [row["ttft_s"] for row, _ in pairs], [row["ttft_s"] for _, row in pairs]
    return asdict(stats.paired_difference(watched, alone, [str(row["unit"]) for row, _ in pairs]))


def show(table: list[dict[str, Any]]) -> None:
    print(f"{'arm':<10} {'valid':>7} {'error':>7} {'late p99':>9} {'waited':>9} {'TTFT':>8}  slower than off, 95 %: "
          "valid units; all units")  # fmt: skip
    for row in table:
        error = "-" if row["median_error"] is None else f"{100 * row['median_error']:.2f} %"
        ttft = "-" if row["ttft_s"] is None else f"{row['ttft_s']:.3f} s"
        valid, late = f"{row['valid']}/{row['sessions']}", f"{1e3 * row['lateness_p99_s']:.2f} ms"
        waited = f"{1e3 * row['starved']:.0f} ms/s"
        words = "; ".join(_words(row[key]) for key in ("slower_valid", "slower_all"))
        print(f"{row['arm']:<10} {valid:>7} {error:>7} {late:>9} {waited:>9} {ttft:>8}  {words}")


def _words(mean: dict[str, Any] | None) -> str:
    if mean is None or mean["value"] is None:
        return "-"
    interval = "" if mean["low"] is None else f" [{1e3 * mean['low']:+.1f}, {1e3 * mean['high']:+.1f}]"
    return f"{1e3 * mean['value']:+.1f} ms{interval} (n = {mean['n']})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=10, help="of each trace, in every arm (default: 10)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    arms = [arm for arm in ARMS if arm != "browser" or chromium()]
    if options.inside:
        rows = measure(options.inside, options.repetitions, arms)
        (options.inside / "rows.json").write_text(json.dumps(rows))
        return 0
    from kvstream.testbed.emulator import sandbox
    from kvstream.testbed.host import machine

    with tempfile.TemporaryDirectory() as name:
        folder, over, load = Path(name), threading.Event(), os.getloadavg()[0]
        helper = threading.Thread(target=arrange, args=(folder, over))
        helper.start()
        try:
            status = sandbox.run([sys.executable, *sys.argv, "--inside", name])
        finally:
            over.set()
            helper.join()
        if status:
            return status
        found = json.loads((folder / "rows.json").read_text())
    table = judge(found)
    show(table)
    if options.out:
        body = {"table": table, "load": load, "sessions": found} | machine.describe()
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    sys.exit(main())
