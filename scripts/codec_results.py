"""Put the kept results of the codec benchmarks into docs/codecs.md and the README, between markers.

    python scripts/codec_results.py [--check]

They are in benchmarks/results/codec-rate.json and anchor-deltas.json; `--check` writes nothing and exits with 1 when a
page shows other numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "codecs.md"
README = ROOT / "README.md"
STAGES = {
    "channels, one step": "channels as they are",
    "+ RoPE undone": "means removed and RoPE undone",
    "+ KLT of each head": "KLT of each head",
    "+ steps by head": "steps by head",
}
"""Of the ablation, what the README tells, in words that follow each other."""
RESULTS = ROOT / "benchmarks" / "results"
Json = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def levels(result: Json) -> str:
    """Every level of every codec, model beside model, and the ratios to the public code's level 1."""
    models: Mapping[str, Json] = result["models"]
    head = ["codec, level"]
    for model in models:
        head += [f"{model}: bit/element", "KL (nats)", "answers"]
    rows = []
    first = next(iter(models.values()))
    for row in (r for r in first["levels"] if r["chunk_tokens"] == 1_024):
        cells = [f"{row['codec']} {row['level']}, {row['name']}"]
        for body in models.values():
            (same,) = (r for r in body["levels"] if key(r) == key(row))
            cells += [f"{same['bits']:.2f}", f"{same['kl']:.2g}", f"{same['right']}/{same['asked']}"]
        rows.append(cells)
    said = []
    for model, body in models.items():
        for entry in body["ratio"]:
            kls = f"KL {entry['kl']:.3f} against {entry['artifact_kl']:.3f}"
            said.append(
                f"On {model}, in chunks of {entry['chunk_tokens']:,} tokens, level {entry['level']} of `kvstream` is "
                f"as good as level 1 of `artifact` or better ({kls}, no fewer answers) and "
                f"**{entry['all_in']:.1f} times smaller** all in, {entry['payload']:.1f} times than its payload alone."
            )
    return table(head, rows) + "\n\n" + "\n\n".join(said)


def key(row: Json) -> tuple[str, int, int]:
    return row["codec"], row["level"], row["chunk_tokens"]


def ablation(result: Json) -> str:
    """Times the bits of the whole codec at the same KL."""
    models: Mapping[str, Json] = result["models"]
    names = list(dict.fromkeys(row["variant"] for body in models.values() for row in body["ablation"]))
    rows = [[name, *(times(body, name) for body in models.values())] for name in names]
    return table(["stages", *models], rows)


def times(body: Json, variant: str) -> str:
    """A variant that is worse than the smallest level at all its rates takes more than they are times that level's."""
    (row,) = (row for row in body["ablation"] if row["variant"] == variant)
    if row["times_bits"] is not None:
        return f"{row['times_bits']:.2f}"
    smallest = min(r["bits"] for r in body["levels"] if (r["codec"], r["chunk_tokens"]) == ("kvstream", 1_024))
    return f"> {max(point['bits'] for point in row['curve']) / smallest:.1f}"


def stages(result: Json) -> str:
    """What the codec gains, and what its stages are worth, in two sentences."""
    models: Mapping[str, Json] = result["models"]
    gains = [next(r["all_in"] for r in body["ratio"] if r["chunk_tokens"] == 1_024) for body in models.values()]
    steps = [f"{said} {' and '.join(times(body, name) for body in models.values())}" for name, said in STAGES.items()]
    worth = ", ".join(steps).replace("> ", "over ")  # which could begin a line, and a quotation
    return fill(
        f"At no worse quality it is **{gains[0]:.1f} times smaller** than what CacheGen's public code sends, and "
        f"{gains[1]:.1f} times on a second model. For the same KL, the stages so far take so many times the bits of "
        f"the whole codec, on the two: {worth}; 1 with a metric within each head.",
        120,
    )


def offline(result: Json) -> str:
    """What encoding every level of a chunk takes and makes."""
    models: Mapping[str, Json] = result["models"]
    head = ["codec"]
    for model in models:
        head += [f"{model}: CPU s per 1,024 tokens", "stored, of 16 bit", "profile"]
    rows = []
    for codec in ("kvstream", "cachegen", "artifact", "uniform"):
        cells = [codec]
        for body in models.values():
            row = next(r for r in body["levels"] if (r["codec"], r["chunk_tokens"]) == (codec, 1_024))
            profile = body["profile_bytes"].get(codec)
            cells += [
                f"{row['encode_cpu_s']:.2f}",
                f"{row['stored_over_bf16']:.0%}",
                f"{profile / 1e6:.2f} MB" if profile else "-",
            ]
        rows.append(cells)
    return table(head, rows)


def anchors(result: Json) -> str:
    """Empirical rates beside the prototype's."""
    rows = [
        [
            f"{row['codec']}, {row['level']}",
            f"{row['bits']:.2f}",
            f"{row['prototype_bits']:.2f}" if "prototype_bits" in row else "-",
            f"{row['all_in_bits']:.2f}" if row["all_in_bits"] else "-",
            f"{row['kl']:.2g}" if row["kl"] else "-",
            f"{row['prototype_kl']:.2g}" if "prototype_kl" in row else "-",
        ]
        for row in result["rows"]
    ]
    return table(["codec, level", "bit/element", "prototype", "all in", "KL (nats)", "prototype"], rows)


def sections() -> Iterator[tuple[Path, str, str]]:
    """Page, name and content of every block."""
    rate = json.loads((RESULTS / "codec-rate.json").read_text(encoding="utf-8"))
    yield README, "codec", stages(rate)
    yield PAGE, "levels", levels(rate)
    yield PAGE, "ablation", ablation(rate)
    yield PAGE, "offline", offline(rate)
    yield PAGE, "anchors", anchors(json.loads((RESULTS / "anchor-deltas.json").read_text(encoding="utf-8")))


def filled() -> dict[Path, str]:
    """The pages with every block's content replaced. Raises SystemExit where a marker is missing."""
    pages: dict[Path, str] = {}
    for path, name, content in sections():
        page = pages.get(path) or path.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: begin; written by scripts/codec_results.py -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{path.name} lacks the markers {begin} and {end}")
        pages[path] = f"{before}{begin}\n{content}\n{end}{after}"
    return pages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when a page is out of date")
    check = parser.parse_args(arguments).check
    status = 0
    for path, new in filled().items():
        if not check:
            path.write_text(new, encoding="utf-8")
        elif new != path.read_text(encoding="utf-8"):
            print(f"{path.relative_to(ROOT)} is out of date: run python scripts/codec_results.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
