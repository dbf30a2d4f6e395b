"""Put the kept results of benchmarks/long_context.py into docs/scale.md, between markers.

    python scripts/scale_results.py [--check]

`--check` writes nothing and exits with 1 if the page shows other numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
KEPT = ROOT / "benchmarks" / "results" / "long-context.json"
WIRE = ROOT / "benchmarks" / "results" / "wire.json"
Json = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def memory(found: Json) -> str:
    """The processes of a stored, served and fetched context."""
    head = ["", *(f"{row['tokens']:,} tokens" for row in found["real"])]

    def line(name: str, *cells: str) -> list[str]:
        return [name, *cells]

    rows = found["real"]
    return table(
        head,
        [
            line("chunks, levels", *(f"{row['chunks']}, {row['levels']}" for row in rows)),
            line("stored, all levels", *(f"{row['bytes'] / 1e9:.2f} GB" for row in rows)),
            line("storing", *(f"{row['store_s']:.1f} s" for row in rows)),
            line("fetched, one level", *(f"{row['fetched_bytes'] / 1e6:.0f} MB" for row in rows)),
            line("fetching and decoding on this CPU", *(f"{row['session_s']:.1f} s" for row in rows)),
            line("peak memory: writer", *(f"{row['store_peak_bytes'] / 1e6:,.0f} MB" for row in rows)),
            line("peak memory: sender", *(f"{row['sender_peak_bytes'] / 1e6:,.0f} MB" for row in rows)),
            line("peak memory: receiver", *(f"{row['receiver_peak_bytes'] / 1e6:,.0f} MB" for row in rows)),
            line("manifest", *(f"{row['manifest_bytes'] / 1e3:.1f} kB" for row in rows)),
            line("hashes", *(f"{row['hashes_bytes'] / 1e3:.1f} kB" for row in rows)),
        ],
    )


def simulated(found: Json) -> str:
    rows = [
        [
            f"{row['tokens']:,}, {row['policy']}",
            f"{row['chunks']:,}",
            f"{row['lowest_bytes'] / 1e9:.2f} to {row['highest_bytes'] / 1e9:.2f} GB",
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['ttft_s']:.2f} s",
            f"{1e3 * row['longest_choice_s']:.2f} ms",
            f"{row['simulate_s']:.2f} s",
            f"{row['manifest_bytes'] / 1e3:.0f} kB",
        ]
        for row in found["simulated"]
    ]
    head = ["tokens, policy", "chunks", "levels", "sent", "TTFT", "longest choice", "simulated in", "manifest"]
    return table(head, rows)


def requests(found: Json) -> str:
    """Of two contexts, so that one sees what grows."""
    few, many = found["bucket"], found["bucket, twice the chunks"]
    steps = [name for name in few if name not in ("chunks", "levels")]

    def told(counts: Json) -> str:
        return ", ".join(f"{count} {verb}" for verb, count in sorted(counts.items())) or "none"

    head = ["", *(f"{one['chunks']} chunks, {one['levels']} levels" for one in (few, many))]
    return table(head, [[name, told(few[name]), told(many[name])] for name in steps])


def sender(found: Json) -> str:
    """What one sender's processor carries, from the benchmark of the wire."""
    row = next(row for row in json.loads(WIRE.read_text())["rows"] if row["arm"] == "stream")
    sent = {entry["tokens"]: entry["bytes"] for entry in found["simulated"] if entry["policy"] == "kvstream"}
    rate = row["gbit_s"]
    per_s = ", ".join(f"{rate * 1e9 / 8 / size:.2f} sessions of {tokens:,} tokens" for tokens, size in sent.items())
    return (
        f"One sender process fills {rate:.1f} Gbit/s over loopback with {row['sender_s_per_gib']:.2f} processor "
        f"seconds per GiB (`benchmarks/results/wire.json`): at the bytes of the table above, {per_s} a second."
    )


def filled() -> str:
    """The page with every block's content replaced. Raises SystemExit where a marker is missing."""
    found, page = json.loads(KEPT.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    for make in (memory, simulated, requests, sender):
        begin, end = (
            f"<!-- {make.__name__}: begin; written by scripts/scale_results.py -->",
            f"<!-- {make.__name__}: end -->",
        )
        before, opened, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise SystemExit(f"{PAGE.name} lacks the markers {begin} and {end}")
        page = f"{before}{begin}\n{make(found)}\n{end}{after}"
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page = filled()
    if page == PAGE.read_text(encoding="utf-8"):
        return 0
    if options.check:
        print("docs/scale.md does not show what was measured; run: python scripts/scale_results.py")
        return 1
    PAGE.write_text(page, encoding="utf-8")
    print("docs/scale.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
