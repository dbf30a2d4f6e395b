"""`report.html`: one self-contained file for screens (light and dark), phones and print."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from kvstream.testbed.config import sweeps
from kvstream.testbed.errors import install
from kvstream.testbed.report import tables
from kvstream.testbed.report.figures import Drawn, draw
from kvstream.testbed.report.material import Material
from kvstream.testbed.report.sessions import embedded, n_levels, trace_specs
from kvstream.testbed.report.style import INK, TEXT_COLOUR, level_colours
from kvstream.testbed.report.tables import number
from kvstream.testbed.results import ci_files, words
from kvstream.testbed.results import summary as summaries
from kvstream.testbed.results.folder import Run
from kvstream.testbed.results.paired import is_counted, units_of

Json: TypeAlias = dict[str, Any]

ASSETS = Path(__file__).with_name("assets")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Content security policy of the page: nothing is fetched."""
PRINT_ONLY = ' class="print"'
"""On a screen the session viewer shows what this figure shows."""


def write(run: Run, baseline: str = "") -> Path:
    """Write `report.html` and `figures/` of a run from its cells; returns the page's path.

    `baseline` is the scheme that the others are compared with (default: the experiment's).
    Without seaborn the page has no figures and says why; an empty run gives a page that says so.
    """
    manifest = run.manifest
    cells = list(run.load_cells())
    rows = [cell["row"] for cell in cells]
    summary = summaries.of_run(rows, manifest, baseline)
    material = _material(summary, cells, manifest, summaries.beside(run, baseline))
    try:
        figures, problem = draw(material, run.path / "figures"), ""
    except ModuleNotFoundError as error:
        figures, problem = [], f"No figures: the package {error.name} is not installed ({install(error.name)})."
    body = "\n".join(
        [
            _header(manifest, summary),
            tables.schemes(summary, material),
            _figures(figures, problem or (material.problem and f"No headline: {material.problem}.")),
            tables.beside(material),
            _viewer(cells, material, manifest),
            tables.by_trace(material),
            _fidelity(rows),
            _provenance(manifest, rows),
            f"<script>{_asset('table.js')}</script>",
        ]
    )
    page = run.path / "report.html"
    part = page.with_name(f".report.html.{os.getpid()}.part")
    part.write_text(_document(manifest["experiment"]["name"], body), encoding="utf-8")
    part.replace(page)
    return page


def _material(
    summary: Json, cells: Sequence[Json], manifest: Mapping[str, Any], simulated: Json | None = None
) -> Material:
    rows: dict[str, list[Json]] = {entry["scheme"]: [] for entry in summary["schemes"]}
    units = units_of(cell["row"] for cell in cells)
    complete = {unit for unit, found in units.items() if is_counted(found, rows)}
    counted = [cell for cell in cells if cell["row"]["unit_id"] in complete]
    for cell in counted:
        if cell["row"]["scheme"] in rows:
            rows[cell["row"]["scheme"]].append(cell["row"])
    return Material(
        summary=summary,
        rows={name: found for name, found in rows.items() if found},
        levels=manifest.get("levels", {}),
        references={
            entry["scheme"]: [cell["row"] for cell in cells if cell["row"]["scheme"] == entry["scheme"]]
            for entry in summary["references"]
        },
        simulated=simulated,
        problem=ci_files.too_invalid(summary),
        families=sweeps.families(manifest["schemes"], manifest["experiment"].get("sweep", ())),
        session=_most_telling(counted, _about(summary), summary["baseline"]),
    )


def _about(summary: Json) -> str:
    """The scheme that the verdict is about: the winner, or else the one of the Pareto set that meets most deadlines."""
    standing = summary["standing"]
    return standing["winner"] or next(iter(standing["pareto"]), "")


def _most_telling(cells: Sequence[Json], scheme: str, baseline: str) -> Json | None:
    """The session to show first: of the scheme that the verdict is about, on a unit whose deadline it met and the
    baseline did not, with many changes of level."""
    shown = [cell for cell in cells if cell["chunks"] and cell["row"]["status"] == "ok"]
    late = {cell["row"]["unit_id"] for cell in cells if cell["row"]["scheme"] == baseline and not cell["row"]["met"]}

    def telling(cell: Json) -> tuple[bool, bool, bool, bool, int, str]:
        levels, row = cell["row"]["levels"], cell["row"]
        moves = sum(a != b for a, b in pairwise(levels))
        differs = row["met"] and row["unit_id"] in late
        return row["scheme"] == scheme, not row["clairvoyant"], differs, row["met"], moves, row["unit_id"]

    return max(shown, key=telling, default=None)


def _document(name: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(name)} · kvstream</title>
<link rel="icon" href="data:,">
<style>
{_asset("uPlot.min.css")}
{_asset("page.css")}
{_asset("viewer.css")}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _header(manifest: Mapping[str, Any], summary: Json) -> str:
    experiment, units = manifest["experiment"], summary["units"]
    deadlines = ", ".join(f"{value:g} s" for value in experiment.get("deadlines_s", []))
    # the verdict is the heading; that nothing real was sent is marked beside it, as large
    synthetic = summary["verdict"].startswith(words.SYNTHETIC)
    verdict, _, rest = summary["verdict"].removeprefix(words.SYNTHETIC).partition(". ")
    mark = f' <span class="mark">{words.SYNTHETIC.lower().removesuffix(". ")}</span>' if synthetic else ""
    facts = [
        "preview only (--quick)" if experiment.get("is_quick") else "",
        f"not finished: {summary['unfinished']}" if summary["unfinished"] else "",
        f"{words.many(units['counted'], 'unit')} × {words.many(len(summary['schemes']), 'scheme')}",
        f"deadline {deadlines}" if deadlines else "",
        words.many(summary["traces"], "trace"),
        {"mininet": "measured over an emulated link (Mininet)", "simulator": "simulated: no data was sent"}.get(
            summary["backend"], summary["backend"]
        ),
    ]
    return f"""<header>
<p class="kicker">kvstream · {escape(experiment["name"])}</p>
<h1 id="verdict">{escape(verdict.removesuffix("."))}.{mark}</h1>
<p>{escape(rest).replace(" %", "&nbsp;%")}</p>
<p class="facts">{" · ".join(escape(fact) for fact in facts if fact)}</p>
</header>"""


def _figures(figures: Sequence[Drawn], problem: str) -> str:
    drawn = "".join(
        f'<figure id="figure-{figure.name}"{PRINT_ONLY if figure.name == "timeline" else ""}>'
        f'<h3>{escape(figure.title)}</h3><div class="wide">{inline(figure)}</div>'
        f"<figcaption>{escape(figure.caption)} "
        f'<a href="figures/{figure.name}.svg">SVG</a> <a href="figures/{figure.name}.png">PNG</a></figcaption></figure>'
        for figure in figures
    )
    box = f'<p class="problem">{escape(problem)}</p>' if problem else ""
    return f"""<section aria-labelledby="figures"><h2 id="figures">Figures</h2>
{box}<div class="figures">{drawn}</div></section>"""


def inline(figure: Drawn) -> str:
    """The SVG as part of the page: no background, the page's text colour, its own ids, a description."""
    svg = figure.svg.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_2">\s*<path [^>]*style="fill: #ffffff[^>]*/>\s*</g>', "", svg, count=1)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\bid="scheme:([^"]*)"', r'data-scheme="\1"', svg)
    svg = re.sub(r'\bid="', f'id="{figure.name}-', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{figure.name}-", svg)
    label = escape(f"{figure.title}. {figure.alt}", quote=True)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)


def _viewer(cells: Sequence[Json], material: Material, manifest: Mapping[str, Any]) -> str:
    """The session viewer: pick a unit and a scheme."""
    entries = (*material.summary["schemes"], *material.summary["references"])
    order = {entry["scheme"]: place for place, entry in enumerate(entries)}
    shown = sorted((cell for cell in cells if cell["chunks"]), key=lambda cell: order[cell["row"]["scheme"]])
    if not shown:
        return ""
    first = (material.session or shown[0])["row"]
    data, omitted = embedded(shown, material.levels, first["unit_id"], trace_specs(manifest))
    most = max(n_levels(cell["row"], material.levels) for cell in shown)
    look = {
        "ladders": {str(n): level_colours(n) for n in range(1, most + 1)},
        "text": TEXT_COLOUR,
        "first": [first["unit_id"], first["scheme"]],
    }
    look_json = json.dumps(look).replace("</", r"<\/")
    scripts = "".join(f"<script>{_asset(name)}</script>" for name in ("uPlot.iife.min.js", "viewer.js", "picker.js"))
    text = f"{words.many(omitted, 'unit')} omitted to keep this page small."
    note = f"<p class=quiet>{text}</p>" if omitted else ""
    return f"""<section aria-labelledby="sessions" class="screen"><h2 id="sessions">Sessions</h2>{note}
<div id="picker" class="picker"></div><div id="viewer"></div><div id="viewer-below" hidden></div>
<script type="application/json" id="session-data">{data}</script>
<script type="application/json" id="session-look">{look_json}</script>
{scripts}</section>"""


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _fidelity(rows: Sequence[Json]) -> str:
    """Whether the link followed its trace, session by session."""
    judged = [row for row in rows if "ok" in row["fidelity"]]
    if not judged:
        return ""
    good = sum(row["fidelity"]["ok"] for row in judged)
    body = "".join(
        f"<tr{'' if row['fidelity']['ok'] else ' class=greyed'}><th scope=row>{escape(row['unit_id'])}"
        f"<td>{escape(row['scheme'])}<td class=why>{escape(_judgement(row['fidelity']))}"
        f"<td>{_percent(row['fidelity'].get('coverage'))}"
        f"<td>{number(row['ttft_s'])}<td>{tables.nats(row['distortion'])}"
        f"<td>{number(row['fidelity'].get('median_error'))}<td>{number(row['fidelity'].get('p95_error'))}"
        f"<td>{number(row['fidelity'].get('total_error'))}"
        f"<td>{number(row['fidelity'].get('lateness_p99_s'))}<td>{row['repeats']}"
        for row in sorted(judged, key=lambda row: (row["fidelity"]["ok"], row["unit_id"], row["scheme"]))
    )
    unjudged = sum(row["fidelity"].get("state") == "unjudged" for row in judged)
    too_little = f" In {unjudged} too little of it could be judged, which does not count as valid." if unjudged else ""
    return f"""<section aria-labelledby="fidelity"><h2 id="fidelity">Fidelity</h2>
<p>In {good} of {words.many(len(judged), "session")} the link followed its trace within the limits.{too_little}
Units with any other session are excluded for every scheme; the numbers of such sessions are greyed out.</p>
<details><summary>All sessions</summary><div class="wide"><table><thead><tr><th scope=col>unit<th scope=col>scheme
<th scope=col>verdict<th scope=col>judged<th scope=col>TTFT <small>s</small><th scope=col>distortion <small>nats</small>
<th scope=col>median error<th scope=col>p95 error<th scope=col>total error
<th scope=col>lateness p99 <small>s</small><th scope=col>repeats</thead>
<tbody>{body}</tbody></table></div></details>{_packets(rows)}</section>"""


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _packets(rows: Sequence[Json]) -> str:
    """Results of the packet captures, if there are any."""
    seen = [(row, row["capture"]) for row in rows if row.get("capture")]
    if not seen:
        return ""
    body = "".join(
        f"<tr{'' if said['ok'] else ' class=bad'}><th scope=row>{escape(row['unit_id'])}<td>{escape(row['scheme'])}"
        f"<td>{number(said['rtt_min_s'])}<td>{number(said['rtt_s'])}<td>{number(said['one_way_s'])}"
        f"<td>{said['retransmitted_bytes']}<td>{number(said['error'])}"
        for row, said in seen
    )
    good = sum(said["ok"] for _, said in seen)
    return f"""<p>Packets were captured at both ends. In {good} of {words.many(len(seen), "session")} the capture is
complete: it agrees with the queue's byte counter within 1 % (unless other traffic shared the queue).</p>
<details><summary>All captures</summary><div class="wide"><table><thead><tr><th scope=col>unit<th scope=col>scheme
<th scope=col>minimum RTT <small>s</small><th scope=col>median RTT <small>s</small>
<th scope=col>median one-way delay <small>s</small><th scope=col>retransmitted <small>bytes</small>
<th scope=col>relative to the counter</thead><tbody>{body}</tbody></table></div></details>"""


def _judgement(fidelity: Mapping[str, Any]) -> str:
    return "ok" if fidelity["ok"] else "; ".join(fidelity.get("reasons", [])) or "limits exceeded"


def _provenance(manifest: Mapping[str, Any], rows: Sequence[Json]) -> str:
    """Everything needed to reproduce the run."""
    models = ", ".join(sorted({row["model"] for row in rows}))
    fingerprint, traces = manifest.get("model", {}).get("fingerprint", ""), manifest.get("traces", {})
    if models == "none" and fingerprint:
        models = "none; sizes of"
    facts = {
        "command": manifest.get("command", ""),
        "commit": manifest.get("git", ""),
        "machine": f"{manifest.get('cores', '?')} cores of {manifest.get('processor', '?')}",
        "kernel": manifest.get("kernel", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "model": f"{models} {_short(fingerprint)}" if fingerprint else models,
        "profiles": _hashes(manifest.get("profiles", {})),
        "files": _hashes(manifest.get("files", {})),
        "traces": f"{len(traces)}, see below" if len(traces) > tables.MAX_TRACES else _hashes(traces),
        "delay and loss": _impairments(manifest.get("networks", {})),
        "simplified": manifest.get("simplified", ""),
    }
    items = "".join(f"<dt>{key}<dd><code>{escape(value)}</code>" for key, value in facts.items() if value)
    folded = {
        "The experiment as resolved": manifest["experiment"],
        "Networks and shapers, as read back from the kernel": manifest.get("networks", {}),
        "Hashes of the traces": traces if len(traces) > tables.MAX_TRACES else {},
    }
    details = "".join(
        f"<details><summary>{head}</summary><pre>{escape(json.dumps(body, indent=1))}</pre></details>"
        for head, body in folded.items()
        if body
    )
    return f"""<section aria-labelledby="provenance"><h2 id="provenance">Provenance</h2><dl>{items}</dl>
{tables.trace_sources(manifest)}{details}</section>"""


def _impairments(networks: Mapping[str, Json]) -> str:
    """The backend of delay and loss on each link that has any."""
    found = {link: network["impairments"]["backend"] for link, network in networks.items() if "impairments" in network}
    return "; ".join(f"{link or 'the default link'}: {backend}" for link, backend in found.items())


def _hashes(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {_short(digest)}" for name, digest in found.items() if digest)


def _short(digest: str) -> str:
    """Enough of a SHA-256 to compare; manifest.json has all of it."""
    return digest[:12]
