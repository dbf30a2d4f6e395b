"""Put a run's result into the README: table, verdict and picture, between two markers.

    python scripts/readme_results.py [RUN]        default: runs/main

The numbers are those of the run's summary.json. They are kept, with what they were measured on, in
benchmarks/results/main.json, from which the README's block is made; a test checks that the two agree.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
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
    """What is kept of a run: its summary, and what it was measured on."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    if summary["backend"] != "mininet":
        raise SystemExit(f"{run}: backend is {summary['backend']}; the README shows emulated links only")
    return {"summary": summary, "measured_on": {key: manifest[key] for key in FACTS}}


def block(result: Mapping[str, Any]) -> str:
    """The README's block, markers included."""
    from testbed.summary import HEADINGS, cells, notes

    summary, facts = result["summary"], result["measured_on"]
    rule = ["---", *["---:"] * (len(HEADINGS) - 1)]
    rows = [list(HEADINGS), rule, *cells(summary)]
    units = summary["units"]
    source = (
        f"Printed by `./run_testbed.sh` at commit `{facts['git']}` on {facts['cores']} cores of {facts['processor']} "
        f"(Linux {facts['kernel'].partition('-')[0]}): {units['counted']} of {units['seen']} units counted, every "
        "session over an emulated link."
    )
    return "\n".join(
        [
            BEGIN,
            f"![Share of missed deadlines against distortion, one point a scheme]({PICTURE.relative_to(ROOT)})",
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
