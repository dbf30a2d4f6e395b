"""On what were choices made? Counts those without an estimate of the link, or on a rate that it never had.

    python benchmarks/choices.py RUN [RUN ...]

RUN is the folder of a run, such as runs/main. Of each session whose policy notes an estimate with its choices
(`estimate_bps` or `rate_bps` in a chunk's reasons), all choices of encoded chunks after the first count. Text is
left out: it needs no estimate and gives none. An estimate is phantom above 1.2 times the highest rate that
the link has had since the session's start. Both must be 0; the exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.policies.api import TEXT  # noqa: E402
from kvstream.testbed.results.folder import Run  # noqa: E402
from kvstream.traces.resolve import open_trace  # noqa: E402
from kvstream.traces.trace import Trace  # noqa: E402

PHANTOM = 1.2
ESTIMATES = ("estimate_bps", "rate_bps")


def estimate_of(chunk: Mapping[str, Any]) -> float | None:
    """The estimate noted with a choice, bit/s."""
    return next((float(chunk["reason"][key]) for key in ESTIMATES if key in chunk["reason"]), None)


def highest_bps(link: Trace, end_s: float, chunk: int) -> float:
    """The highest rate that the link has had by then."""
    if link.per == "chunk":
        return max(link.chunk_rate(i) for i in range(chunk + 1))
    return max(rate for _, rate in link.changes(0.0, max(end_s, 1e-6)))


def judge(chunks: Sequence[Mapping[str, Any]], link: Trace) -> tuple[int, int, int] | None:
    """(choices, without an estimate, phantom) of a session; None for a policy without estimates."""
    encoded = [chunk for chunk in chunks if chunk["level"] != TEXT and chunk["request_s"] is not None]
    later = sorted(encoded, key=lambda chunk: chunk["request_s"])[1:]
    if not any(estimate_of(chunk) is not None for chunk in later):
        return None
    found = [(estimate_of(chunk), highest_bps(link, chunk["request_s"], chunk["chunk"])) for chunk in later]
    blind = sum(estimate is None for estimate, _ in found)
    return len(found), blind, sum(estimate is not None and estimate > PHANTOM * top for estimate, top in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    counts: dict[str, list[int]] = {}
    for run in map(Run.open, parser.parse_args().runs):
        for cell in run.load_cells():
            row = cell["row"]
            if row["status"] != "ok" or row["clairvoyant"]:
                continue
            judged = judge(cell["chunks"], open_trace(row["trace"]).shifted(row["offset_s"]))
            if judged is not None:
                count = counts.setdefault(row["scheme"], [0, 0, 0, 0])
                for at, value in enumerate((1, *judged)):
                    count[at] += value
    print(f"{'scheme':24}{'sessions':>9}{'choices':>9}{'blind':>7}{'phantom':>9}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 0, 0, 0]
    for name, (sessions, choices, blind, phantom) in [*counts.items(), ("all", total)]:
        print(f"{name:24}{sessions:>9}{choices:>9}{blind:>7}{phantom:>9}")
    return 1 if total[2] or total[3] or not total[0] else 0


if __name__ == "__main__":
    sys.exit(main())
