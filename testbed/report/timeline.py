"""The figure of one session: capacity and arrivals, and when link, decoder and model were busy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.report.material import Material
from kvstream.testbed.report.sessions import n_levels, virtual_link, within_view
from kvstream.testbed.report.style import INK, TEXT_COLOUR, level_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def timeline(material: Material) -> Figure | None:
    """Capacity and goodput over time, and below it a lane for each stage: transfers, decoding, and the model's own
    computing."""
    if material.session is None:
        return None
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    row, chunks = material.session["row"], material.session["chunks"]
    link = within_view(material.session["link"] or virtual_link(row, chunks), row)
    count = n_levels(row, material.levels)
    colours: dict[int | str, str] = {**dict(enumerate(level_colours(count))), "text": TEXT_COLOUR}
    figure, (top, lanes) = pyplot.subplots(2, 1, figsize=(6.4, 4.2), sharex=True, height_ratios=(3, 1.9))
    if link:
        times_s = [sample["t_s"] for sample in link]
        top.fill_between(
            times_s, [sample["capacity_bps"] / 1e6 for sample in link], step="post", color="#8a96a3", alpha=0.35, lw=0
        )
        top.plot(*delivered_rate(link), color="#0b7abf", linewidth=1.4, drawstyle="steps-post")
        top.text(
            0.995, 1.02, "grey: capacity, blue: delivered", transform=top.transAxes, ha="right", va="bottom", size=8
        )
    top.set_ylim(bottom=0)
    top.set_ylabel("Mbit/s")
    names = ["compute", "decode", "transfer"]
    for chunk in chunks:
        for name, spans in spans_of(chunk, chunks).items():
            for start_s, end_s in spans:
                lanes.barh(
                    names.index(name),
                    end_s - start_s,
                    left=start_s,
                    color=colours[chunk["level"]],
                    edgecolor="white",
                    lw=0.5 if len(spans) == 1 else 0.0,
                    height=0.8,
                    hatch="///" if name == "compute" else None,
                )
    ends = [chunk["decode_end_s"] for chunk in chunks if chunk["decode_end_s"] is not None]
    if ends and row["ttft_s"] is not None:
        lanes.barh(0, row["ttft_s"] - max(ends), left=max(ends), color=INK, alpha=0.55, height=0.8)
    lanes.set_yticks(range(len(names)), names)
    lanes.set_xlabel("seconds since the request")
    for axes in (top, lanes):
        axes.axvline(row["deadline_s"], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(left=0)
    top.set_title(
        f"{row['scheme']} on {row['context']} over {row['trace'].partition(',')[0]}", fontsize="medium", loc="left"
    )
    used = [level for level in (*range(count), "text") if level in row["levels"]]
    figure.legend(
        handles=[Patch(color=colours[level], label=f"level {level}" if level != "text" else "text") for level in used]
        + ([Patch(color=INK, alpha=0.55, label="prefill")] if ends else []),
        loc="outside lower center",
        ncols=7,
        fontsize="small",
        handlelength=1,
    )
    return figure


def spans_of(chunk: Mapping[str, Any], chunks: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[tuple[float, float]]]:
    """[lane]: when it was busy with a chunk. A transfer counts from the end of the one before it."""
    if chunk["last_byte_s"] is None:
        return {}
    before = [c["last_byte_s"] for c in chunks if c["last_byte_s"] is not None]
    start_s = max([end_s for end_s in before if end_s < chunk["last_byte_s"]] + [chunk["request_s"]])
    spans: dict[str, Sequence[tuple[float, float]]] = {"transfer": [(start_s, chunk["last_byte_s"])]}
    if chunk["decode_end_s"] is not None:
        name = "compute" if chunk["level"] == "text" else "decode"
        spans[name] = chunk.get("pieces_s") or [(chunk["decode_start_s"], chunk["decode_end_s"])]
    return spans


WINDOW_S: Final = 0.01
"""Bytes are counted over windows of this length: longer ones would show arrivals during an outage."""
LONGEST_S: Final = 0.05
ENOUGH_BYTES: Final = 15_000
"""At low rates windows are longer, up to LONGEST_S, until they hold ten packets: fewer show packets, not a rate."""


def delivered_rate(link: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """(beginning of each window in seconds, delivered Mbit/s at layer 2 in it), to be drawn as steps."""
    times_s, rates = [], []
    start = before = link[0]
    for sample in link[1:]:
        elapsed_s, size = sample["t_s"] - start["t_s"], sample["delivered_bytes"] - start["delivered_bytes"]
        changes = sample["capacity_bps"] != before["capacity_bps"]
        before = sample
        whole = elapsed_s >= 0.95 * WINDOW_S and (size >= ENOUGH_BYTES or not size)
        if whole or elapsed_s >= LONGEST_S or (changes and elapsed_s >= 0.45 * WINDOW_S):
            times_s.append(start["t_s"])
            rates.append(size * 8 / elapsed_s / 1e6)
            start = sample
    if rates:
        times_s.append(start["t_s"])
        rates.append(rates[-1])
    return times_s, rates
