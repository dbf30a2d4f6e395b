"""The stream of a dashboard: the state of a run when a browser connects, then every new event.

The state is short whatever the run's length: one row per finished session, and the events of the current one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeAlias

from kvstream.testbed import events
from kvstream.testbed.report.style import INK, scheme_style
from kvstream.testbed.results.folder import Run

Json: TypeAlias = dict[str, Any]

POLL_S: Final = 0.1
"""Interval at which the file is checked: one stat, unless it has grown."""

_ROW = (
    *("unit_id", "scheme", "policy", "codec", "clairvoyant", "depth", "overlap", "context", "trace", "deadline_s"),
    *("reference", "status", "why", "ttft_s", "met", "distortion", "answers_right", "answers", "bytes", "regret"),
)


class Feed:
    """The events of one run, from its `events.jsonl` or, for a run without one, from its cells."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._file = run.path / events.FILE_NAME

    def state(self) -> tuple[Json, int]:
        """(everything up to now, offset of the next event). A run that has not started is live and empty."""
        start: Json | None = None
        current: Json | None = None
        rows: dict[tuple[str, str], Json] = {}
        offset, ended = 0, False
        for line, end in events.read(self._file):
            event, offset = json.loads(line), end
            kind = event["event"]
            if kind == "run_start":
                start, ended = event, False
            elif kind == "session_start":
                current = {"start": event, "chunks": {}}
            elif kind == "chunk" and current is not None:
                if _key(event) == _key(current["start"]):
                    current["chunks"][event["record"].get("chunk")] = event
            elif kind == "session_end":
                row = row_of(event["row"])
                rows[row["unit_id"], row["scheme"]] = row
                current = None
            elif kind == "run_end":
                ended, current = True, None
        for cell in () if rows else self._run.load_cells():
            row = row_of(cell["row"])
            rows[row["unit_id"], row["scheme"]] = row
        state = {
            "event": "state",
            "name": start["name"] if start else self._run.path.name,
            "sessions": start["sessions"] if start else len(rows),
            "live": len(rows) < start["sessions"] and not ended if start else not rows,
            "compared": self._compared(),
            "rows": list(rows.values()),
            "current": None
            if current is None
            else {"start": current["start"], "chunks": list(current["chunks"].values())},
        }
        return state, offset

    def _compared(self) -> list[str]:
        """Schemes that a unit must have to count, as in the report."""
        return self._run.compared if self._run.exists() else []

    async def follow(self, offset: int) -> AsyncIterator[Json]:
        """New events from `offset` on, forever; the state again when the run is started over."""
        while True:
            size = self._file.stat().st_size if self._file.is_file() else 0
            if size < offset:
                state, offset = self.state()
                yield state
            elif size > offset:
                for line, end in events.read(self._file, offset):
                    event, offset = json.loads(line), end
                    if event["event"] == "session_end":
                        event["row"] = row_of(event["row"])
                    elif event["event"] == "run_start":
                        event["compared"] = self._compared()
                    yield event
            await asyncio.sleep(POLL_S)


def row_of(row: Mapping[str, Any]) -> Json:
    """A session's fields for the dashboard's table, and how its scheme is drawn."""
    style = scheme_style(row)
    colour = "currentColor" if style.colour == INK else style.colour
    return {key: row.get(key) for key in _ROW} | {"colour": colour, "hollow": style.hollow}


def cell_of(run: Run, unit_id: str, scheme: str) -> Json | None:
    """The cell of a session; None if there is none. Names are compared, never turned into paths."""
    wanted = {f"{unit_id}-{scheme}.json", f"{unit_id}-{scheme}.failure.json", f"{unit_id}.json"}
    for file in sorted(run.cells.glob("*.json")):
        if file.name in wanted:
            body: Json = json.loads(file.read_text(encoding="utf-8"))
            for cell in body.get("cells", [body]):
                if cell["row"]["scheme"] == scheme:
                    found: Json = cell
                    return found
    return None


def _key(event: Mapping[str, Any]) -> tuple[str, str]:
    return event["unit_id"], event["scheme"]
