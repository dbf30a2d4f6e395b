"""Put the kept results of the codec benchmarks into docs/codecs.md and the README, between markers, and the levels on
the real model where figures of reports find them.

    python scripts/codec_results.py [--check]

The results are in benchmarks/results/codec-rate.json and anchor-deltas.json. `--check` writes nothing and exits with 1
if a page shows different numbers.
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
KNOWN = ROOT / "testbed" / "report" / "known_levels.json"
MODELS = {
    "smollm2": "SmolLM2-135M, which nobody here trained",
    "large": "one of 189 million parameters of our training",
    "tiny-kv": "the bundled model",
    "second": "a second small one of our training",
}
"""In the order in which pages name them, real models first."""
TEXTS = {
    "check": "like the calibration's",
    "prose": "other English prose",
    "language": "other languages",
    "random": "random characters",
}
RESULTS = ROOT / "benchmarks" / "results"
Json = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def quality(row: Json) -> list[str]:
    return [f"{row['bits']:.2f}", f"{row['kl']:.2g}", f"{row['right']}/{row['asked']}"]


def measured_on_check(result: Json) -> dict[str, Json]:
    """The models that were measured on text like the calibration's, with every codec."""
    return {name: body for name, body in result["models"].items() if "levels" in body}


def levels(result: Json) -> str:
    """Every level of every codec, model beside model."""
    models = measured_on_check(result)
    head = ["codec, level"]
    for model in models:
        head += [f"{model}: bit/element", "KL (nats)", "answers"]
    rows = []
    every = {(r["codec"], r["level"]): r["name"] for body in models.values() for r in body["levels"]}
    for (codec, level), name in every.items():
        cells = [f"{codec} {level}, {name}"]
        for body in models.values():
            same = next((r for r in body["levels"] if (r["codec"], r["level"]) == (codec, level)), None)
            cells += ["-"] * 3 if same is None else quality(same)
        rows.append(cells)
    return table(head, rows)


def gains(result: Json) -> str:
    """How many times fewer bits kvstream takes at the KL of the other codecs' levels."""
    models = measured_on_check(result)
    keys = list(dict.fromkeys((r["codec"], r["level"]) for body in models.values() for r in body["ratios"]))
    names = {(r["codec"], r["level"]): r["name"] for body in models.values() for r in body["levels"]}
    rows = []
    for key in keys:
        found = [next((r for r in body["ratios"] if (r["codec"], r["level"]) == key), None) for body in models.values()]
        rows.append([f"{key[0]} {key[1]}, {names[key]}", *(f"{r['times']:.1f}x" if r else "-" for r in found)])
    return table(["at the KL of", *models], rows)


def ablation(result: Json) -> str:
    """Bits of every variant at the same KL, relative to the whole codec."""
    models: Mapping[str, Json] = result["models"]
    models = {name: body for name, body in models.items() if body.get("ablation")}
    names = list(dict.fromkeys(row["variant"] for body in models.values() for row in body["ablation"]))
    rows = [[name, *(times(body, name) for body in models.values())] for name in names]
    return table(["stages", *models], rows)


def texts(result: Json) -> str:
    """What holds on text unlike the calibration's: a row for each model and kind of text that was measured."""
    head = [
        "model",
        "text",
        "contexts",
        "artifact 1",
        "kvtc",
        "kvstream: bit/element",
        "KL (nats)",
        "answers",
        "exact cache",
    ]
    rows = []
    for model, body in result["models"].items():
        for text, about in TEXTS.items():
            entry = body if text == "check" else body.get("texts", {}).get(text)
            if entry is None or "levels" not in entry:
                continue
            near = min((r for r in entry["levels"] if r["codec"] == "kvstream"), key=lambda r: abs(r["bits"] - 0.5))
            found = [
                [r["times"] for r in entry["ratios"] if r["codec"] == codec and level in (None, r["level"])]
                for codec, level in (("artifact", 1), ("kvtc", None))
            ]
            exact = f"{entry['exact']}/{near['asked']}" if "exact" in entry else "-"
            gained = (f"{min(times):.1f}x" if times else "-" for times in found)
            rows.append([model, about, str(len(near["kl_by_context"])), *gained, *quality(near), exact])
    return table(head, rows)


def times(body: Json, variant: str) -> str:
    """Relative bits of a variant; `-` where the model has no such stage, or no level of the variant is as good."""
    row = next((row for row in body["ablation"] if row["variant"] == variant), None)
    return "-" if row is None or row["times_bits"] is None else f"{row['times_bits']:.2f}"


def headline(result: Json) -> str:
    """The gain over CacheGen's public code on every model, in one sentence."""
    said = []
    for model, body in measured_on_check(result).items():
        (row,) = (r for r in body["ratios"] if (r["codec"], r["level"]) == ("artifact", 1))
        said.append(f"**{row['times']:.0f} times** on {MODELS.get(model, model)}")
    return fill(
        "At the KL divergence of what CacheGen's public code sends at its middle level, it takes fewer bits: "
        + ", ".join(said)
        + ". All counts include everything a chunk carries; the text is held out.",
        120,
    )


def offline(result: Json) -> str:
    """Time and size of encoding every level of a chunk, of models that were measured without a GPU: on one, most of
    kvstream's time is not the processor's."""
    models = {name: body for name, body in measured_on_check(result).items() if "cuda" not in body["command"]}
    head = ["codec"]
    for model in models:
        head += [f"{model}: CPU s per 1,024 tokens", "stored, of 16 bit", "profile"]
    rows = []
    for codec in ("kvstream", "kvtc", "cachegen", "artifact", "uniform"):
        cells = [codec]
        for body in models.values():
            row = next((r for r in body["levels"] if r["codec"] == codec), None)
            if row is None:
                cells += ["-"] * 3
                continue
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
    place = {name: number for number, name in enumerate(MODELS)}
    rate["models"] = dict(sorted(rate["models"].items(), key=lambda item: place.get(item[0], len(place))))
    yield README, "codec", headline(rate)
    yield PAGE, "levels", levels(rate)
    yield PAGE, "gains", gains(rate)
    yield PAGE, "texts", texts(rate)
    yield PAGE, "ablation", ablation(rate)
    yield PAGE, "offline", offline(rate)
    yield PAGE, "anchors", anchors(json.loads((RESULTS / "anchor-deltas.json").read_text(encoding="utf-8")))


def known_levels() -> str:
    """[codec]: (bit/element, KL) of each level on SmolLM2, for `testbed/report/ladders.py`."""
    body = json.loads((RESULTS / "codec-rate.json").read_text(encoding="utf-8"))["models"]["smollm2"]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in body["levels"]:
        if row["codec"] in ("artifact", "kvstream"):
            found.setdefault(row["codec"], []).append((round(row["bits"], 4), float(f"{row['kl']:.4g}")))
    return json.dumps({"model": "SmolLM2-135M", "levels": found}, indent=1) + "\n"


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
    return pages | {KNOWN: known_levels()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    status = 0
    for path, new in filled().items():
        if not check:
            path.write_text(new, encoding="utf-8")
        elif not path.is_file() or new != path.read_text(encoding="utf-8"):
            print(f"{path.relative_to(ROOT)} is out of date: run python scripts/codec_results.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
