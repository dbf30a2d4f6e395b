"""A session as lines of characters: the link's capacity, the levels in transfer, and the deadline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.report.style import TEXT_COLOUR, ink_on, level_colours
from kvstream.testbed.session.record import SessionRecord
from kvstream.traces.trace import Trace

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 66
"""Columns, where the terminal has so many."""

SPAN = 1.2
"""The columns cover this many deadlines from the request on."""

_BLOCKS = " ▁▂▃▄▅▆▇█"


def link_line(capacity: Trace, deadline_s: float, width: int = WIDTH) -> Text:
    """The link's capacity as bars, scaled to the peak."""
    from rich.text import Text

    step_s = SPAN * deadline_s / width
    rates = [(capacity.bits_by((i + 1) * step_s) - capacity.bits_by(i * step_s)) / step_s for i in range(width)]
    peak = max(*rates, 1.0)
    return _with_deadline(Text("".join(_BLOCKS[round(8 * rate / peak)] for rate in rates), style="dim"))


def session_line(record: SessionRecord | None, n_levels: int, deadline_s: float, width: int = WIDTH) -> Text:
    """The chunk in transfer at each moment: its level where it starts, then a line; `=` decoding, `*` first token."""
    from rich.style import Style
    from rich.text import Text

    if record is None:
        return _with_deadline(Text("the link stopped carrying data".ljust(width)))
    colours = level_colours(n_levels)
    step_s = SPAN * deadline_s / width
    line = Text()
    before: int | None = None
    spans = _spans(record)
    for column in range(width):
        middle_s = (column + 0.5) * step_s
        chunk, level = next(((c, v) for start_s, end_s, c, v in spans if start_s <= middle_s < end_s), (None, None))
        if level is not None:
            colour = TEXT_COLOUR if level == TEXT else colours[int(level)]
            style = Style(color=ink_on(colour), bgcolor=colour, bold=True)
            line.append(_glyph(level) if chunk != before else "─", style)
        elif middle_s - step_s / 2 <= record.ttft_s < middle_s + step_s / 2:
            line.append("*", "bold")
        elif spans and spans[-1][1] <= middle_s < record.ttft_s:
            line.append("=", "dim")
        else:
            line.append(" " if middle_s > record.ttft_s else "·", "dim")
        before = chunk
    if record.ttft_s >= SPAN * deadline_s:
        line = line[: width - 1] + Text(">", "bold")
    return _with_deadline(line)


def _spans(record: SessionRecord) -> list[tuple[float, float, int, LevelOrText]]:
    """(from, to, chunk, level) of every transfer, in the order of arrival."""
    spans: list[tuple[float, float, int, LevelOrText]] = []
    free_s = 0.0
    for chunk in sorted(record.chunks, key=lambda chunk: chunk.last_byte_s or 0.0):
        if chunk.request_s is None or chunk.last_byte_s is None or chunk.level is None:
            continue
        spans.append((max(chunk.request_s, free_s), chunk.last_byte_s, chunk.chunk, chunk.level))
        free_s = chunk.last_byte_s
    return spans


def _glyph(level: LevelOrText) -> str:
    return "T" if level == TEXT else str(int(level) % 10)


def _with_deadline(line: Text) -> Text:
    """The line with a mark at the deadline."""
    from rich.text import Text

    at = round(len(line) / SPAN)
    return line[:at] + Text("│", "bold") + line[at:]
