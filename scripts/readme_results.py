"""Put a run's result into the README: table, verdict and picture, between two markers.

    python scripts/readme_results.py [RUN]        default: runs/main

The numbers are those of the run's summary.json, with those of the same experiment in the simulator beside them. They
are kept, with the machine they were measured on, in benchmarks/results/main.json, from which the README's block is
generated; a test checks that the two agree.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
KEPT = ROOT / "benchmarks" / "results" / "main.json"
PICTURE = ROOT / "docs" / "images" / "result.png"
BEGIN = "<!-- result: begin; written by scripts/readme_results.py -->"
END = "<!-- result: end -->"
FACTS = ("git", "kernel", "processor", "cores", "command")


def kept(run: Path) -> dict[str, Any]:
    """What is kept of a run: its summary, and the commit and machine of the measurement."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    if summary["backend"] != "mininet":
        raise SystemExit(f"{run}: backend is {summary['backend']}; the README shows emulated links only")
    return {"summary": summary, "measured_on": {key: manifest[key] for key in FACTS}}


def block(result: Mapping[str, Any]) -> str:
    """The README's block, markers included."""
    from kvstream.testbed.results.table import HEADINGS, cells, notes

    summary, facts = result["summary"], result["measured_on"]
    rows = [list(HEADINGS), *cells(summary)]
    beside = summary.get("simulated")
    if beside:
        rows = [[*row, *more] for row, more in zip(rows, _simulated(rows, beside), strict=True)]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    units = summary["units"]
    title = "SLO violations and distortion by deadline" if summary.get("deadlines") else "SLO violations vs distortion"
    source = (
        f"Printed by `./run_testbed.sh` at commit `{facts['git']}` on {facts['cores']} cores of {facts['processor']} "
        f"(Linux {facts['kernel'].partition('-')[0]}): {units['counted']} of {units['seen']} units counted, every "
        "session over an emulated link."
    )
    return "\n".join(
        [
            BEGIN,
            f"![{title}, for each scheme]({PICTURE.relative_to(ROOT)})",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            *(f"{note}  ".replace("* ", r"\* ", 1) for note in notes(summary)),
            "",
            f"> {summary['verdict']}",
            "",
            source,
            END,
        ]
    )


def _simulated(rows: Sequence[Sequence[str]], beside: Mapping[str, Any]) -> list[list[str]]:
    """For each row of the table: deadlines met and distortion of the same scheme in the simulator."""
    from kvstream.testbed.results.table import HEADINGS, cells

    met, distortion = HEADINGS.index("deadline met"), HEADINGS.index("distortion")
    found = {row[0]: [row[met], row[distortion]] for row in cells(dict(beside))}
    head = [f"simulated: met (n={beside['units']['counted']:,})", "distortion"]
    return [head, *(found.get(row[0], ["-", "-"]) for row in rows[1:])]


def replaced(readme: str, new: str) -> str:
    """The README with its block replaced. Raises SystemExit where a marker is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}")
    return before + new + after


def main(arguments: list[str]) -> int:
    run = Path(arguments[0]) if arguments else ROOT / "runs" / "main"
    result = kept(run)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "figures" / "headline.png", PICTURE)
    README.write_text(replaced(README.read_text(encoding="utf-8"), block(result)), encoding="utf-8")
    print(f"{README.name}, {KEPT.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)} show {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
