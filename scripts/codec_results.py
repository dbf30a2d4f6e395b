"""Put the kept results of the codec benchmarks into docs/codecs.md, between markers.

    python scripts/codec_results.py [--check]

Tables are made from benchmarks/results/codec-rate.json and anchor-deltas.json; `--check` writes nothing and exits with
1 when the page shows other numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "codecs.md"
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


def sections() -> Iterator[tuple[str, str]]:
    rate = json.loads((RESULTS / "codec-rate.json").read_text(encoding="utf-8"))
    yield "levels", levels(rate)
    yield "ablation", ablation(rate)
    yield "offline", offline(rate)
    yield "anchors", anchors(json.loads((RESULTS / "anchor-deltas.json").read_text(encoding="utf-8")))


def filled(page: str) -> str:
    """The page with every section's content replaced. Raises SystemExit where a marker is missing."""
    for name, content in sections():
        begin, end = f"<!-- {name}: begin; written by scripts/codec_results.py -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{PAGE.name} lacks the markers {begin} and {end}")
        page = f"{before}{begin}\n{content}\n{end}{after}"
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when the page is out of date")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        print(f"{PAGE.relative_to(ROOT)} is out of date: run python scripts/codec_results.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
