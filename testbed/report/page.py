"""`report.html`: one file, no network, light and dark, for a phone and for paper."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from testbed import summary as summaries
from testbed.report import tables
from testbed.report.figures import Drawn, draw
from testbed.report.material import Material
from testbed.report.sessions import embedded, n_levels
from testbed.report.style import INK, TEXT_COLOUR, level_colours
from testbed.report.tables import number
from testbed.results import Run

Json: TypeAlias = dict[str, Any]

ASSETS = Path(__file__).with_name("assets")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Content security policy of the page: nothing is ever fetched."""
PRINT_ONLY = ' class="print"'
"""On a screen the session viewer shows what this figure shows."""


def write(run: Run, baseline: str = "") -> Path:
    """Write `report.html` and `figures/` of a run from its cells; returns the page's path.

    `baseline` is the scheme that the others are compared with, by default the experiment's.
    Without seaborn the page has no figures and says so. An empty run gives a page that says so too.
    """
    manifest = run.manifest
    cells = list(run.load_cells())
    rows = [cell["row"] for cell in cells]
    summary = summaries.summarise(
        rows, scheme_names(manifest, rows), baseline or manifest["experiment"].get("baseline", "")
    )
    material = _material(summary, cells, manifest)
    try:
        figures, problem = draw(material, run.path / "figures"), ""
    except ModuleNotFoundError as error:
        figures, problem = [], f"No figures: the package {error.name} is not installed (pip install 'kvstream[run]')."
    body = "\n".join(
        [
            _header(manifest, summary),
            tables.schemes(summary, material),
            _figures(figures, problem),
            _viewer(cells, material),
            tables.by_trace(material),
            _fidelity(rows),
            _provenance(manifest, rows),
        ]
    )
    page = run.path / "report.html"
    part = page.with_name(f".report.html.{os.getpid()}.part")
    part.write_text(_document(manifest["experiment"]["name"], body), encoding="utf-8")
    part.replace(page)
    return page


def scheme_names(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Schemes in the experiment's order."""
    listed = [entry["name"] for entry in manifest.get("schemes", [])]
    return listed or list(dict.fromkeys(row["scheme"] for row in rows))


def _material(summary: Json, cells: Sequence[Json], manifest: Mapping[str, Any]) -> Material:
    rows: dict[str, list[Json]] = {entry["scheme"]: [] for entry in summary["schemes"]}
    schemes: dict[str, set[str]] = {}
    for cell in cells:
        schemes.setdefault(cell["row"]["unit_id"], set()).add(cell["row"]["scheme"])
    complete = {unit for unit, found in schemes.items() if found >= rows.keys()} - set(summary["invalid_units"])
    counted = [cell for cell in cells if cell["row"]["unit_id"] in complete]
    for cell in counted:
        if cell["row"]["scheme"] in rows:
            rows[cell["row"]["scheme"]].append(cell["row"])
    return Material(
        summary=summary,
        rows={name: found for name, found in rows.items() if found},
        levels=manifest.get("levels", {}),
        session=_telling(counted),
    )


def _telling(cells: Sequence[Json]) -> Json | None:
    """The session to show first: one that met the deadline with many changes of level, not told the future."""
    shown = [cell for cell in cells if cell["chunks"] and cell["row"]["status"] == "ok"]

    def changes(cell: Json) -> tuple[bool, bool, int, str]:
        levels, row = cell["row"]["levels"], cell["row"]
        moves = sum(a != b for a, b in pairwise(levels))
        return not row["clairvoyant"], row["met"], moves, row["unit_id"]

    return max(shown, key=changes, default=None)


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
    # the verdict is what the page is called after; that nothing real was sent stands beside it, as large
    synthetic = summary["verdict"].startswith(summaries.SYNTHETIC)
    verdict, _, rest = summary["verdict"].removeprefix(summaries.SYNTHETIC).partition(". ")
    mark = f' <span class="mark">{summaries.SYNTHETIC.lower().removesuffix(". ")}</span>' if synthetic else ""
    facts = [
        "a quick look, not comparable with other runs" if experiment.get("is_quick") else "",
        f"{summaries.many(units['counted'], 'unit')} × {summaries.many(len(summary['schemes']), 'scheme')}",
        f"deadline {deadlines}" if deadlines else "",
        summaries.many(summary["traces"], "trace"),
        {"mininet": "measured over an emulated link (Mininet)", "simulator": "simulated, nothing was sent"}.get(
            summary["backend"], summary["backend"]
        ),
    ]
    return f"""<header>
<p class="kicker">kvstream · {escape(experiment["name"])}</p>
<h1 id="verdict">{escape(verdict.removesuffix("."))}.{mark}</h1>
<p>{escape(rest)}</p>
<p class="facts">{" · ".join(escape(fact) for fact in facts if fact)}</p>
</header>"""


def _figures(figures: Sequence[Drawn], problem: str) -> str:
    drawn = "".join(
        f'<figure id="figure-{figure.name}"{PRINT_ONLY if figure.name == "timeline" else ""}>'
        f"<h3>{escape(figure.title)}</h3>{inline(figure)}"
        f"<figcaption>{escape(figure.caption)} "
        f'<a href="figures/{figure.name}.svg">SVG</a> <a href="figures/{figure.name}.png">PNG</a></figcaption></figure>'
        for figure in figures
    )
    return f"""<section aria-labelledby="figures"><h2 id="figures">Figures</h2>
{escape(problem)}<div class="figures">{drawn}</div></section>"""


def inline(figure: Drawn) -> str:
    """The SVG as part of the page: no background, the page's text colour, its own ids, a description."""
    svg = figure.svg.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_2">\s*<path [^>]*style="fill: #ffffff[^>]*/>\s*</g>', "", svg, count=1)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{figure.name}-', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{figure.name}-", svg)
    label = escape(f"{figure.title}. {figure.alt}", quote=True)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)


def _viewer(cells: Sequence[Json], material: Material) -> str:
    """Pick a unit and a scheme, see the transfer."""
    order = {entry["scheme"]: place for place, entry in enumerate(material.summary["schemes"])}
    shown = sorted((cell for cell in cells if cell["chunks"]), key=lambda cell: order[cell["row"]["scheme"]])
    if not shown:
        return ""
    first = (material.session or shown[0])["row"]
    data, left_out = embedded(shown, material.levels, first["unit_id"])
    most = max(n_levels(cell["row"], material.levels) for cell in shown)
    look = {
        "ladders": {str(n): level_colours(n) for n in range(1, most + 1)},
        "text": TEXT_COLOUR,
        "first": [first["unit_id"], first["scheme"]],
    }
    look_json = json.dumps(look).replace("</", r"<\/")
    scripts = "".join(f"<script>{_asset(name)}</script>" for name in ("uPlot.iife.min.js", "viewer.js", "picker.js"))
    words = f"{summaries.many(left_out, 'unit')} left out to keep this page small."
    note = f"<p class=quiet>{words}</p>" if left_out else ""
    return f"""<section aria-labelledby="sessions" class="screen"><h2 id="sessions">Sessions</h2>{note}
<div id="picker" class="picker"></div><div id="viewer"></div>
<script type="application/json" id="session-data">{data}</script>
<script type="application/json" id="session-look">{look_json}</script>
{scripts}</section>"""


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _fidelity(rows: Sequence[Json]) -> str:
    """Whether the link did what the trace says, session by session."""
    judged = [row for row in rows if "ok" in row["fidelity"]]
    if not judged:
        return ""
    good = sum(row["fidelity"]["ok"] for row in judged)
    body = "".join(
        f"<tr{'' if row['fidelity']['ok'] else ' class=bad'}><th scope=row>{escape(row['unit_id'])}"
        f"<td>{escape(row['scheme'])}<td>{escape(_judgement(row['fidelity']))}"
        f"<td>{number(row['fidelity'].get('median_error'))}<td>{number(row['fidelity'].get('p95_error'))}"
        f"<td>{number(row['fidelity'].get('lateness_p99_s'))}<td>{row['repeats']}"
        for row in sorted(judged, key=lambda row: (row["fidelity"]["ok"], row["unit_id"], row["scheme"]))
    )
    return f"""<section aria-labelledby="fidelity"><h2 id="fidelity">Fidelity</h2>
<p>{good} of {len(judged)} sessions ran on a link that did what the trace says.
A unit with one that did not is left out for every scheme.</p>
<details><summary>Every session</summary><div class="wide"><table><thead><tr><th scope=col>unit<th scope=col>scheme
<th scope=col>verdict<th scope=col>median error<th scope=col>p95 error
<th scope=col>lateness p99 <small>s</small><th scope=col>repeats</thead>
<tbody>{body}</tbody></table></div></details>{_packets(rows)}</section>"""


def _packets(rows: Sequence[Json]) -> str:
    """What captures say, where packets were recorded."""
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
    return f"""<p>Packets were recorded at both ends: in {good} of {len(seen)} sessions none was missed, and they
add up to what the queue counted, within 1 %, where nobody else sent through it.</p>
<details><summary>Every capture</summary><div class="wide"><table><thead><tr><th scope=col>unit<th scope=col>scheme
<th scope=col>least round trip <small>s</small><th scope=col>median <small>s</small>
<th scope=col>one way, median <small>s</small><th scope=col>retransmitted <small>bytes</small>
<th scope=col>against the counters</thead><tbody>{body}</tbody></table></div></details>"""


def _judgement(fidelity: Mapping[str, Any]) -> str:
    return "ok" if fidelity["ok"] else "; ".join(fidelity.get("reasons", [])) or "over the limits"


def _provenance(manifest: Mapping[str, Any], rows: Sequence[Json]) -> str:
    """What is needed to do it again."""
    models = ", ".join(sorted({row["model"] for row in rows}))
    fingerprint, traces = manifest.get("model", {}).get("fingerprint", ""), manifest.get("traces", {})
    if models == "none" and fingerprint:
        models = "none, sizes from"
    facts = {
        "command": manifest.get("command", ""),
        "commit": manifest.get("git", ""),
        "machine": f"{manifest.get('cores', '?')} cores of {manifest.get('processor', '?')}",
        "kernel": manifest.get("kernel", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "model": f"{models} {_short(fingerprint)}" if fingerprint else models,
        "profiles": _hashes(manifest.get("profiles", {})),
        "files": _hashes(manifest.get("files", {})),
        "traces": f"{len(traces)}, see below" if len(traces) > tables.MOST_TRACES else _hashes(traces),
        "delay and loss": _impairments(manifest.get("networks", {})),
        "simplified": manifest.get("simplified", ""),
    }
    items = "".join(f"<dt>{key}<dd><code>{escape(value)}</code>" for key, value in facts.items() if value)
    folded = {
        "The experiment as it was resolved": manifest["experiment"],
        "The networks and their shapers, as read back": manifest.get("networks", {}),
        "The traces by their hashes": traces if len(traces) > tables.MOST_TRACES else {},
    }
    details = "".join(
        f"<details><summary>{head}</summary><pre>{escape(json.dumps(body, indent=1))}</pre></details>"
        for head, body in folded.items()
        if body
    )
    return f"""<section aria-labelledby="provenance"><h2 id="provenance">Provenance</h2><dl>{items}</dl>
{details}</section>"""


def _impairments(networks: Mapping[str, Json]) -> str:
    """What delays and loses packets on each link that has something to do so."""
    found = {link: network["impairments"]["backend"] for link, network in networks.items() if "impairments" in network}
    return "; ".join(f"{link or 'the default link'}: {backend}" for link, backend in found.items())


def _hashes(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {_short(digest)}" for name, digest in found.items() if digest)


def _short(digest: str) -> str:
    """Enough of a SHA-256 to compare; the whole one stands in manifest.json."""
    return digest[:12]
