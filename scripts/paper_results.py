"""Compare the paper's experiments with the paper: benchmarks/results/policies.json, docs/paper.md and its figures.

    kvstream simulate examples/paper_slo.toml
    kvstream simulate examples/paper_slo_time.toml
    kvstream simulate examples/paper_ttft.toml
    kvstream run examples/paper_slo_link.toml           (the subset over emulated links; unchanged if not run)
    python scripts/paper_results.py [--runs DIR]

The numbers are those of the runs' summaries. A test checks that the page agrees with the kept file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "paper.md"
KEPT = ROOT / "benchmarks" / "results" / "policies.json"
IMAGES = ROOT / "docs" / "images"
RUNS = ("paper_slo", "paper_slo_time", "paper_slo_link", "paper_ttft")
FACTS = ("git", "kernel", "processor", "cores")
LONGCHAT, RATE = "longchat", "paper-constant,rate=3Gbps"
PAPER_AT_1S = {"8-bit": 81.0, "cachegen": 8.0}
"""Deadlines of 1 s missed, per cent (figure 13): the baseline of equal quality, and CacheGen."""

Json = dict[str, Any]


def kept(runs: Path, before: Mapping[str, Any]) -> Json:
    """What is kept of each run: its settings one by one, its workload, and the machine of the measurement."""
    found = dict(before)
    for name in RUNS:
        folder = runs / name
        if not (folder / "summary.json").is_file():
            continue
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found[name] = {
            "backend": summary["backend"],
            "units": summary["units"],
            "workload": manifest["workload"],
            "schemes": manifest["schemes"],
            "settings": summary["settings"],
            "regret": {e["scheme"]: [e["regret"], e["regret_n"]] for e in summary["schemes"]},
            "verdict": summary["verdict"],
            "measured_on": {key: manifest[key] for key in FACTS},
        }
    return found


# --- the page


def blocks(result: Mapping[str, Any]) -> dict[str, str]:
    """[name]: the content between the page's markers of that name."""
    made = {"sizes": sizes(result["paper_slo"]), "slo": slo(result["paper_slo"]), "ttft": ttft(result["paper_ttft"])}
    made["slo-time"] = slo(result["paper_slo_time"])
    if "paper_slo_link" in result:
        made["slo-link"] = slo(result["paper_slo_link"]) + "\n\n" + source(result["paper_slo_link"])
    return made


def sizes(run: Mapping[str, Any]) -> str:
    """The assumptions of all numbers: sizes of levels, decode and recompute times."""
    facts = run["workload"]
    rows = [["codec", "levels (KB per token)", "decoding a chunk"]]
    for codec, rungs in facts["kb_per_token"].items():
        words = ", ".join(f"{name}: {size:g}" for name, size in rungs.items())
        rows.append([codec, words, f"{facts['decode_s_per_chunk'][codec] * 1e3:.1f} ms"])
    recompute = facts["recompute_s"]
    first, last = recompute["chunks"][0], recompute["chunks"][-1]
    words = (
        f"Text: {facts['text_kb_per_token'] * 1e3:g} bytes per token; recomputing all of `{recompute['context']}` "
        f"takes {recompute['all']:.2f} s, its first chunk {first:.3f} s, its last {last:.3f} s."
    )
    return table(rows) + f"\n\n{words}"


def slo(run: Mapping[str, Any]) -> str:
    """SLO violations and distortion of every scheme in every setting."""
    names = [scheme["name"] for scheme in run["schemes"]]
    several = len({entry["trace"] for entry in run["settings"]}) > 1
    rows = [[*(["rates"] if several else []), "deadline", "units", *names]]
    for entry in run["settings"]:
        head = [form(entry["trace"])] if several else []
        rates = [f"{100 * entry['schemes'][name]['violations']:.1f} %" for name in names]
        rows.append([*head, f"{entry['deadline_s']:g} s", str(entry["n"]), *rates])
    middle = [entry for entry in run["settings"] if entry["deadline_s"] == 1.0] or run["settings"]
    for entry in middle:
        head = [form(entry["trace"])] if several else []
        nats = [f"{entry['schemes'][name]['distortion']:.2g}" for name in names]
        rows.append([*head, f"*nats at {entry['deadline_s']:g} s*", str(entry["n"]), *nats])
    return table(rows)


def form(trace: str) -> str:
    """How long the link keeps a rate."""
    settings = dict(part.partition("=")[::2] for part in trace.split(",")[1:])
    return f"held {settings['hold'].removesuffix('s')} s" if settings.get("per") == "time" else "one per chunk"


def ttft(run: Mapping[str, Any]) -> str:
    """TTFT by bandwidth at LongChat's length, and by length at 3 Gbit/s, with the factors that the paper gives."""
    names = [scheme["name"] for scheme in run["schemes"]]
    rows = [["context", "link", *names, "text / cachegen", "8-bit / cachegen"]]
    for entry in run["settings"]:
        if entry["context"] != LONGCHAT and entry["trace"] != RATE:
            continue
        seconds = {name: entry["schemes"][name]["ttft_p50_s"] for name in names}
        default = seconds["cachegen-default"]
        tokens = run["workload"]["contexts"][entry["context"]]
        rows.append([
            f"{tokens} tokens", entry["trace"].partition("rate=")[2].replace("Gbps", " Gbit/s"),
            *(f"{1e3 * seconds[name]:.0f} ms" for name in names),
            f"{seconds['text'] / default:.2f}", f"{seconds['8-bit'] / default:.2f}",
        ])  # fmt: skip
    return table(rows)


def source(run: Mapping[str, Any]) -> str:
    facts, units = run["measured_on"], run["units"]
    return (
        f"Over emulated links, real bytes, compute by profile: {units['counted']} of {units['seen']} units counted, at "
        f"commit `{facts['git']}` on {facts['cores']} cores of {facts['processor']}."
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def replaced(page: str, made: Mapping[str, str]) -> str:
    """The page with every block replaced by its new content. Raises SystemExit where a marker is missing."""
    for name, block in made.items():
        begin, end = f"<!-- {name}: begin; written by scripts/paper_results.py -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{PAGE.name} lacks the markers {begin} and {end}")
        page = f"{before}{begin}\n{block}\n{end}{after}"
    return page


# --- the figures


def draw(result: Mapping[str, Any], folder: Path) -> None:
    from matplotlib import pyplot

    from kvstream.testbed.report.figures import theme

    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[Mapping[str, Any]], Any]] = {"paper-slo": draw_slo, "paper-ttft": draw_ttft}
    with theme():
        for name, painter in figures.items():
            figure = painter(result)
            figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": "kvstream"})
            pyplot.close(figure)


SLO_SCHEMES = ("8-bit", "fixed", "cachegen", "our-policy", "ours", "our-oracle")
SLO_WORDS = {"our-policy": "our policy, CacheGen's codec", "ours": "our policy, our codec",
             "our-oracle": "oracle, our codec (clairvoyant)"}  # fmt: skip
WORDS = {
    "8-bit": "8 bits", "fixed": "CacheGen's default level", "cachegen": "Algorithm 1", "ours": "ours",
    "our-oracle": "oracle (clairvoyant)", "text": "text", "cachegen-default": "CacheGen's default level",
}  # fmt: skip


def words_of(name: str) -> str:
    """A scheme of the TTFT figure in a legend; `ours-1.2bit` is our codec at the level of that rate."""
    rate = name.removeprefix("ours-").removesuffix("bit")
    return f"ours, {rate} bits" if name.startswith("ours-") else WORDS[name]


def draw_slo(result: Mapping[str, Any]) -> Any:
    """SLO violations vs deadline, one panel per form of the trace model."""
    from matplotlib import pyplot

    entries = [*result["paper_slo"]["settings"], *result["paper_slo_time"]["settings"]]
    traces = list(dict.fromkeys(entry["trace"] for entry in entries))
    figure, panels = pyplot.subplots(1, len(traces), figsize=(9.6, 3.4), sharey=True)
    titles = {"one per chunk": "one rate per chunk (the paper's)"}
    for axes, trace in zip(panels, traces, strict=True):
        mine = [entry for entry in entries if entry["trace"] == trace]
        for name in SLO_SCHEMES:
            look = style(name, result["paper_slo"])
            shares = [100 * entry["schemes"][name]["violations"] for entry in mine]
            axes.plot([entry["deadline_s"] for entry in mine], shares, label=SLO_WORDS.get(name) or WORDS[name], **look)
        axes.set_title(titles.get(form(trace), f"each rate {form(trace)}"), fontsize="medium")
        axes.set_xticks([entry["deadline_s"] for entry in mine])
        axes.set_xlabel("deadline (s)")
        axes.set_ylim(-3, 103)
        axes.grid()
    for name, percent in PAPER_AT_1S.items():
        colour = style(name, result["paper_slo"])["color"]
        panels[0].plot(1.0, percent, marker="x", markersize=9, markeredgewidth=2.2, linestyle="none", color=colour)
    panels[0].plot(
        [], [], marker="x", markeredgewidth=2.2, linestyle="none", color="#262626", label="the paper's figures"
    )
    panels[0].set_ylabel("SLO violations (% of units)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def draw_ttft(result: Mapping[str, Any]) -> Any:
    """TTFT vs bandwidth and vs context length."""
    from matplotlib import pyplot

    run = result["paper_ttft"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
    for scheme in run["schemes"]:
        name = scheme["name"]
        look = style(name, run)
        by_rate = [e for e in run["settings"] if e["context"] == LONGCHAT]
        by_length = [e for e in run["settings"] if e["trace"] == RATE]
        rates = [float(e["trace"].partition("rate=")[2].removesuffix("Gbps")) for e in by_rate]
        lengths = [run["workload"]["contexts"][e["context"]] for e in by_length]
        left.plot(rates, [e["schemes"][name]["ttft_p50_s"] for e in by_rate], label=words_of(name), **look)
        right.plot(lengths, [e["schemes"][name]["ttft_p50_s"] for e in by_length], **look)
    left.set(xscale="log", yscale="log", xlabel="bandwidth (Gbit/s)", ylabel="TTFT (s)")
    left.set_title("LongChat, 9,490 tokens", fontsize="medium")
    right.set(xscale="log", xlabel="context (tokens)")
    right.set_title("3 Gbit/s", fontsize="medium")
    for axes in (left, right):
        axes.grid()
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return figure


def style(name: str, run: Mapping[str, Any]) -> Json:
    """matplotlib's keywords for a scheme's look: the same as in every report."""
    from kvstream.testbed.report.style import scheme_style

    known = {"our-oracle": "oracle", "ours": "kvstream", "our-policy": "kvstream", "cachegen-default": "fixed"}
    label = known.get(name.partition("-1.")[0], "highest" if name == "8-bit" else name)
    [scheme] = [scheme for scheme in run["schemes"] if scheme["name"] == name]
    look = scheme_style({"scheme": label, "policy": label, "codec": scheme["codec"]})
    return {"color": look.colour, "marker": look.marker, "markersize": 6, "linewidth": 1.8, "linestyle": look.dash}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where runs are kept")
    args = parser.parse_args()
    from kvstream.testbed.results.folder import write_whole

    result = kept(args.runs, json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {})
    write_whole(KEPT, result)
    draw(result, IMAGES)
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), blocks(result)), encoding="utf-8")
    print(f"{PAGE.name}, {KEPT.relative_to(ROOT)} and figures show {', '.join(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
