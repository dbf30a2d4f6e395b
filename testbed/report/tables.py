"""The report's tables: schemes compared, and deadlines met by trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from kvstream.testbed.report import export
from kvstream.testbed.report.axes import group_of
from kvstream.testbed.report.material import Material
from kvstream.testbed.report.style import INK, scheme_style
from kvstream.testbed.results import by_setting, table, words

Json: TypeAlias = dict[str, Any]

MAX_TRACES: Final = 30
"""Rows of an unfolded table; beyond that, traces that differ only in their seed share a row."""
DISTORTIONS: Final = ("distortion", "distortion_met")
"""Over all sessions, and over those that met the deadline."""


def schemes(summary: Json, material: Material) -> str:
    """One row per scheme: results with intervals, and paired differences to the baseline; reference lines apart.

    Columns that are empty throughout are left out, and those that seldom decide come with `more`.
    """
    base = escape(summary["baseline"])
    every = (*summary["schemes"], *summary["references"])
    known = {one["scheme"]: material.rows.get(one["scheme"]) or material.references.get(one["scheme"]) for one in every}
    filled = [entry for entry in every if known[entry["scheme"]]]
    columns = [one for one in _columns(base) if any(one.cell(entry) not in EMPTY for entry in filled)]
    head = "".join(f"<th scope=col{column.kind}>{column.heading}" for column in columns)
    parts = []
    for entries, title in ((summary["schemes"], ""), (summary["references"], "Reference lines")):
        body = "".join(_row(entry, known[entry["scheme"]] or (), columns) for entry in entries)
        if title and entries:
            on = words.many(entries[0]["n"], "unit")
            body = f"<tr><th scope=rowgroup colspan={1 + len(columns)}>{title}, on {on} only{body}"
        parts += [f"<tbody>{body}"] if entries else []
    more = '<button type="button" id="more" aria-expanded="false" hidden>more columns</button> ' * any(
        column.is_more for column in columns
    )
    remarks = "".join(f"<li>{escape(note)}" for note in table.notes(summary))
    return f"""<section aria-labelledby="schemes"><h2 id="schemes">Schemes</h2>
<div class="wide"><table class="numbers sortable" id="scheme-table"><thead><tr><th scope=col>scheme{head}</thead>
{"".join(parts)}</table></div>
<p class="tools">{more}The table as {_exports(summary)}</p>
<ul class="notes">{remarks}</ul></section>"""


EMPTY: Final = ("–", "baseline")
"""Cells without a number."""


@dataclass(frozen=True)
class Column:
    """Of the table of schemes. `value` is what it is sorted by."""

    heading: str
    cell: Callable[[Json], str]
    value: Callable[[Json], float | None]
    is_more: bool = False

    @property
    def kind(self) -> str:
        return " class=more" if self.is_more else ""


def _columns(base: str) -> list[Column]:
    """Eight that are seen first, and some more."""
    return [
        Column("n", lambda e: str(e["n"]), lambda e: e["n"]),
        Column("deadline met <small>95 % interval</small>", _met, lambda e: e["met_rate"]),
        Column(f"vs {base} <small>met, points</small>", _met_vs, lambda e: (e["versus"] or {}).get("met")),
        Column("TTFT p50 <small>p95 / p99, s</small>", _ttft, lambda e: e["ttft_p50_s"]),
        *(_distortion(key, of) for key, of in zip(DISTORTIONS, ("all sessions", "deadline met"), strict=True)),
        Column("correct answers", lambda e: f"{e['answers_right']}/{e['answers']}" if e["answers"] else "–",
               lambda e: e["answers_right"] / e["answers"] if e["answers"] else None),
        Column("regret <small>nats (n)</small>",
               lambda e: f"{nats(e['regret'])} <small>({e['regret_n']})</small>" if e["regret_n"] else "–",
               lambda e: e["regret"]),
        Column(f"vs {base} <small>distortion, nats</small>", _distortion_vs,
               lambda e: (e["versus"] or {}).get("distortion"), True),
        Column("measured KL <small>nats</small>", lambda e: nats(e["measured_kl"]), lambda e: e["measured_kl"], True),
        Column("bytes", _size, lambda e: e["bytes"], True),
        Column("fidelity", lambda e: f"{e['fidelity_ok']}/{e['fidelity_n']}" if e["fidelity_n"] else "–",
               lambda e: e["fidelity_ok"] / e["fidelity_n"] if e["fidelity_n"] else None, True),
    ]  # fmt: skip


def _distortion(key: str, of: str) -> Column:
    return Column(
        f"distortion, {of} <small>nats, 95 % interval</small>",
        lambda entry: nats(entry[key]) + _interval(entry[f"{key}_low"], entry[f"{key}_high"]),
        lambda entry: entry[key],
    )


def _row(entry: Json, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    name = escape(entry["scheme"])
    if not rows:
        return f"<tr><th scope=row>{name}<td colspan={len(columns)} class=none>no valid session yet"
    mark = f" <abbr title='{words.CLAIRVOYANT}'>*</abbr>" if entry["clairvoyant"] else ""
    mark += f" <abbr title='{words.REFERENCE}'>†</abbr>" if entry["reference"] else ""
    cells = "".join(f"<td{column.kind}{_sorted_by(column.value(entry))}>{column.cell(entry)}" for column in columns)
    return f'<tr data-row="{escape(group_of(entry["scheme"]))}"><th scope=row>{swatch(rows[0])} {name}{mark}{cells}'


def _sorted_by(value: float | None) -> str:
    return "" if value is None else f" data-v={value:.6g}"


def _met(entry: Json) -> str:
    style = scheme_style(entry | {"depth": 2, "overlap": True})
    return _interval_bar(entry, style.colour) if entry["n"] else "–"


def _ttft(entry: Json) -> str:
    if entry["ttft_p50_s"] is None:
        return "–"
    tail = " / ".join(number(entry[f"ttft_{p}_s"]) for p in ("p95", "p99"))
    return f"{number(entry['ttft_p50_s'])} <small>{tail}</small>"


def _exports(summary: Json) -> str:
    """Links that hold the table in three forms."""
    made = {"Markdown": ("md", export.markdown), "CSV": ("csv", export.csv_text), "LaTeX": ("tex", export.latex)}
    return ", ".join(
        f'<a download="schemes.{end}" href="data:text/plain;charset=utf-8,{quote(write(summary))}">{name}</a>'
        for name, (end, write) in made.items()
    )


def beside(material: Material) -> str:
    """The same experiment in the simulator: violations and distortion of each scheme over many more units."""
    if material.simulated is None:
        return ""
    measured = {entry["scheme"]: entry for entry in material.summary["schemes"]}
    parts = material.simulated["deadlines"]
    head = "".join(f"<th scope=col>at {part['deadline_s']:g} s <small>%, nats</small>" for part in parts)
    body = []
    for at, entry in enumerate(material.simulated["schemes"]):
        emulated = measured.get(entry["scheme"])
        rows = material.rows.get(entry["scheme"])
        cells = [
            _violations(emulated) if emulated and emulated["n"] else "–",
            _violations(entry),
            nats(emulated["distortion"] if emulated else None),
            nats(entry["distortion"]) + _interval(entry["distortion_low"], entry["distortion_high"]),
            *(_violations(part["schemes"][at], part["schemes"][at]["distortion"]) for part in parts),
        ]
        name = (swatch(rows[0]) + " " if rows else "") + escape(entry["scheme"]) + " *" * entry["clairvoyant"]
        body.append(f"<tr><th scope=row>{name}" + "".join(f"<td>{cell}" for cell in cells))
    units = words.many(material.simulated["units"]["counted"], "unit")
    return f"""<section aria-labelledby="beside"><h2 id="beside">The same in the simulator</h2>
<p>{units} of the same kinds of links, with the compute times of the emulated sessions.</p>
<div class="wide"><table class="numbers"><thead><tr><th scope=col>scheme<th scope=col>SLO violations
<small>emulated, %</small><th scope=col>SLO violations <small>simulated, %</small><th scope=col>distortion
<small>emulated, nats</small><th scope=col>distortion <small>simulated, nats, 95 % interval</small>{head}</thead>
<tbody>{"".join(body)}</tbody></table></div></section>"""


def _violations(entry: Json, distortion: float | None = None) -> str:
    """In per cent, with the interval, or a distortion, as a small second line."""
    share = f"{100 * (1 - entry['met_rate']):.1f}"
    if distortion is not None:
        return f"{share} <small>{nats(distortion)}</small>"
    if entry["met_low"] is None:
        return share
    return f"{share} <small>{100 * (1 - entry['met_high']):.1f}–{100 * (1 - entry['met_low']):.1f}</small>"


def _interval_bar(entry: Json, colour: str) -> str:
    """Share and interval as numbers and as a small bar on a scale from 0 to 100 %."""
    rate, known = 100 * entry["met_rate"], entry["met_low"] is not None
    colour = "currentColor" if colour == INK else colour
    low, high = (100 * entry[key] if known else rate for key in ("met_low", "met_high"))
    return (
        f"<span class=num>{words.percent(entry['met_rate'])} <small>{words.interval(entry)}</small></span>"
        f'<svg class="bar" viewBox="0 0 104 10" aria-hidden="true"><path d="M2 5H102" class="axis"/>'
        f'<path d="M{low + 2:.1f} 5H{high + 2:.1f}" stroke="{colour}" stroke-width="3" opacity=".45"/>'
        f'<circle cx="{rate + 2:.1f}" cy="5" r="3.4" fill="{colour}"/></svg>'
    )


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    """A small second line; empty without an interval."""
    return "" if low is None or high is None else f" <small>{nats(low, sign)} to {nats(high, sign)}</small>"


def _met_vs(entry: Json) -> str:
    paired = entry["versus"]
    if paired is None:
        return "–" if entry["reference"] else "baseline"
    if paired["met"] is None:
        return "–"
    points = f"{100 * paired['met']:+.0f} <small>"
    if paired["met_low"] is None:
        return points + f"p {paired['met_p']:.1g}</small>"
    return (
        points + f"{100 * paired['met_low']:+.0f} to {100 * paired['met_high']:+.0f}, p {paired['met_p']:.1g}</small>"
    )


def _distortion_vs(entry: Json) -> str:
    paired = entry["versus"]
    if paired is None:
        return "–" if entry["reference"] else "baseline"
    return nats(paired["distortion"], "+") + _interval(paired["distortion_low"], paired["distortion_high"], "+")


def _size(entry: Json) -> str:
    size = words.bytes_words(entry["bytes"])
    return size + (
        f" <small>+ {words.bytes_words(entry['wasted_bytes'])} wasted</small>" if entry["wasted_bytes"] else ""
    )


def swatch(row: Mapping[str, Any]) -> str:
    """A scheme's colour as a small mark beside its name."""
    style = scheme_style(row)
    colour = "currentColor" if style.colour == INK else style.colour
    fill = "none" if style.hollow else colour
    circle = f'<circle cx="6" cy="6" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
    return f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">{circle}</svg>'


def by_trace(material: Material) -> str:
    """Deadlines met by trace: an average over traces can hide that a scheme fails on one of them."""
    names = dict.fromkeys(row["trace"] for rows in material.rows.values() for row in rows)
    if len(names) < 2:
        return ""
    many = len(names) > MAX_TRACES
    row_of = {name: by_setting.unseeded(name) if many else name for name in names}
    counts: dict[str, dict[str, list[int]]] = {head: {} for head in row_of.values()}
    for scheme, rows in material.rows.items():
        for row in rows:
            count = counts[row_of[row["trace"]]].setdefault(scheme, [0, 0])
            count[0] += row["met"]
            count[1] += 1
    head = "".join(f"<th scope=col>{escape(scheme)}" for scheme in material.rows)
    body = "".join(
        f"<tr><th scope=row>{escape(name).replace(',', ',<wbr>')}"
        + "".join(_share(*met.get(scheme, (0, 0))) for scheme in material.rows)
        for name, met in counts.items()
    )
    table = f"""<div class="wide"><table><thead><tr><th scope=col>trace{head}</thead>
<tbody>{body}</tbody></table></div>"""
    if len(counts) > MAX_TRACES:
        table = f"<details><summary>{words.many(len(counts), 'trace')}</summary>{table}</details>"
    elif len(counts) < len(names):
        table = f"<p class=quiet>{len(names)} traces; those that differ only in their seed share a row.</p>{table}"
    return f"""<section aria-labelledby="traces" id="by-trace"><h2 id="traces">Deadlines met, by trace</h2>
{table}</section>"""


def trace_sources(manifest: Mapping[str, Any]) -> str:
    """Where the run's traces come from: file and its hash, format and how it was chosen, what was done, licence."""
    body = "".join(
        f"<tr><th scope=row>{escape(name)}<td>{escape(one['source'])} <small>{escape(one['sha256'][:12])}</small>"
        f"<td>{escape(one['format'])} <small>{escape(one.get('chosen', ''))}</small><td>{escape(said['kind'])}"
        f"<td>{escape('; '.join(one['transforms']))}<td>{escape(one['licence'])}"
        for name, said in manifest.get("provenance", {}).items()
        for one in said["sources"]
    )
    skipped = "".join(f"<li>{escape(name)}: {escape(why)}" for name, why in (manifest.get("skipped") or {}).items())
    if skipped:
        count = words.many(len(manifest["skipped"]), "file")
        skipped = f"<p>Skipped, because they could not be read: {count}.<ul>{skipped}</ul>"
    if not body:
        return skipped
    return f"""{skipped}<details id="trace-sources"><summary>Sources of the traces</summary><div class="wide"><table>
<thead><tr><th scope=col>trace<th scope=col>source <small>SHA-256</small><th scope=col>format
<th scope=col>rates are<th scope=col>what was done<th scope=col>licence</thead>
<tbody>{body}</tbody></table></div></details>"""


def _share(met: int, n: int) -> str:
    return f'<td class="share" style="--share:{met / n:.3f}">{met}/{n}' if n else "<td>–"


def nats(value: float | None, sign: str = "") -> str:
    """As in the terminal's table, with the page's dash for unknown values."""
    return "–" if value is None else words.nats(value, sign)


def number(value: float | None) -> str:
    """Three digits; a dash for unknown values."""
    return "–" if value is None else "0" if value == 0 else f"{value:.3g}"
