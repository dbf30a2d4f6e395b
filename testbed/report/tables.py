"""The report's tables of numbers: schemes beside each other, and deadlines met trace by trace."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final, TypeAlias

from testbed import settings
from testbed import summary as summaries
from testbed.report.material import Material
from testbed.report.style import INK, scheme_style

Json: TypeAlias = dict[str, Any]

MOST_TRACES: Final = 30
"""Rows of a table that is open; traces that differ in their seed only are one row where there are more."""


def schemes(summary: Json, material: Material) -> str:
    """One row a scheme: what it reached, with intervals, and the paired differences to the baseline."""
    base = escape(summary["baseline"])
    head = (
        "<th scope=col>scheme<th scope=col>n<th scope=col>deadline met <small>95 % interval</small>"
        f"<th scope=col>against {base} <small>met, points</small>"
        "<th scope=col>TTFT p50 <small>p95 / p99, s</small>"
        "<th scope=col>distortion <small>nats, 95 % interval</small>"
        f"<th scope=col>against {base} <small>distortion, nats</small>"
        "<th scope=col>KL measured <small>nats</small><th scope=col>answers right<th scope=col>bytes"
        "<th scope=col>regret <small>nats (n)</small><th scope=col>fidelity"
    )
    body = []
    for entry in summary["schemes"]:
        name = escape(entry["scheme"])
        rows = material.rows.get(entry["scheme"])
        if not rows:
            body.append(f"<tr><th scope=row>{name}<td colspan=11 class=none>no valid session yet")
            continue
        cells = [
            str(entry["n"]),
            _interval_bar(entry, scheme_style(rows[0]).colour),
            _met_against(entry["versus"]),
            f"{number(entry['ttft_p50_s'])} <small>"
            + " / ".join(number(entry[f"ttft_{p}_s"]) for p in ("p95", "p99"))
            + "</small>",
            nats(entry["distortion"]) + _interval(entry["distortion_low"], entry["distortion_high"]),
            _distortion_against(entry["versus"]),
            nats(entry["measured_kl"]),
            f"{entry['answers_right']}/{entry['answers']}" if entry["answers"] else "–",
            _size(entry),
            f"{nats(entry['regret'])} <small>({entry['regret_n']})</small>" if entry["regret_n"] else "–",
            f"{entry['fidelity_ok']}/{entry['fidelity_n']}" if entry["fidelity_n"] else "–",
        ]
        mark = " <abbr title='told the future of the link'>*</abbr>" if entry["clairvoyant"] else ""
        body.append(f"<tr><th scope=row>{swatch(rows[0])} {name}{mark}" + "".join(f"<td>{cell}" for cell in cells))
    remarks = "".join(f"<li>{escape(note)}" for note in summaries.notes(summary))
    return f"""<section aria-labelledby="schemes"><h2 id="schemes">Schemes</h2>
<div class="wide"><table class="numbers"><thead><tr>{head}</thead><tbody>{"".join(body)}</tbody></table></div>
<ul class="notes">{remarks}</ul></section>"""


def _interval_bar(entry: Json, colour: str) -> str:
    """Share and interval as numbers and as a small bar on a scale from 0 to 100 %."""
    low, rate, high = (100 * entry[key] for key in ("met_low", "met_rate", "met_high"))
    colour = "currentColor" if colour == INK else colour
    return (
        f"<span class=num>{rate:.0f} % <small>{low:.0f}–{high:.0f}</small></span>"
        f'<svg class="bar" viewBox="0 0 104 10" aria-hidden="true"><path d="M2 5H102" class="axis"/>'
        f'<path d="M{low + 2:.1f} 5H{high + 2:.1f}" stroke="{colour}" stroke-width="3" opacity=".45"/>'
        f'<circle cx="{rate + 2:.1f}" cy="5" r="3.4" fill="{colour}"/></svg>'
    )


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    """A small second line, empty where nothing can be said."""
    return "" if low is None or high is None else f" <small>{nats(low, sign)} to {nats(high, sign)}</small>"


def _met_against(paired: Json | None) -> str:
    if paired is None:
        return "baseline"
    if paired["met"] is None:
        return "–"
    points = f"{100 * paired['met']:+.0f} <small>"
    if paired["met_low"] is None:
        return points + f"one trace, p {paired['met_p']:.1g}</small>"
    return (
        points + f"{100 * paired['met_low']:+.0f} to {100 * paired['met_high']:+.0f}, p {paired['met_p']:.1g}</small>"
    )


def _distortion_against(paired: Json | None) -> str:
    if paired is None:
        return "baseline"
    return nats(paired["distortion"], "+") + _interval(paired["distortion_low"], paired["distortion_high"], "+")


def _size(entry: Json) -> str:
    size = summaries.bytes_words(entry["bytes"])
    return size + (
        f" <small>+ {summaries.bytes_words(entry['wasted_bytes'])} wasted</small>" if entry["wasted_bytes"] else ""
    )


def swatch(row: Mapping[str, Any]) -> str:
    """A scheme's colour as a small mark beside its name."""
    style = scheme_style(row)
    colour = "currentColor" if style.colour == INK else style.colour
    fill = "none" if style.hollow else colour
    circle = f'<circle cx="6" cy="6" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
    return f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">{circle}</svg>'


def by_trace(material: Material) -> str:
    """Deadlines met a trace: an average over traces can hide that a scheme fails on one of them."""
    names = dict.fromkeys(row["trace"] for rows in material.rows.values() for row in rows)
    if len(names) < 2:
        return ""
    many = len(names) > MOST_TRACES
    row_of = {name: settings.unseeded(name) if many else name for name in names}
    counts: dict[str, dict[str, list[int]]] = {head: {} for head in row_of.values()}
    for scheme, rows in material.rows.items():
        for row in rows:
            count = counts[row_of[row["trace"]]].setdefault(scheme, [0, 0])
            count[0] += row["met"]
            count[1] += 1
    head = "".join(f"<th scope=col>{escape(scheme)}" for scheme in material.rows)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}" + "".join(_share(*met.get(scheme, (0, 0))) for scheme in material.rows)
        for name, met in counts.items()
    )
    table = f"""<div class="wide"><table><thead><tr><th scope=col>trace{head}</thead>
<tbody>{body}</tbody></table></div>"""
    if len(counts) > MOST_TRACES:
        table = f"<details><summary>{len(counts)} traces</summary>{table}</details>"
    elif len(counts) < len(names):
        table = f"<p class=quiet>{len(names)} traces; those that differ only in their seed are one row.</p>{table}"
    return f"""<section aria-labelledby="traces" id="by-trace"><h2 id="traces">Deadlines met, by trace</h2>
{table}</section>"""


def _share(met: int, n: int) -> str:
    return f'<td class="share" style="--share:{met / n:.3f}">{met}/{n}' if n else "<td>–"


def nats(value: float | None, sign: str = "") -> str:
    """As in the terminal's table, with the page's dash for what is unknown."""
    return "–" if value is None else summaries.nats(value, sign)


def number(value: float | None) -> str:
    """Three digits, a dash for what is unknown."""
    return "–" if value is None else "0" if value == 0 else f"{value:.3g}"
