"""Throttling profiles of dash.js, as in the MMSys 2020 challenge: `[{"speed": kbit/s, "duration": s}, ...]`.

As JSON, or as the JavaScript that holds them (`const PROFILE_CASCADE = [{speed: 1200, duration: 30}, ...]`); a file may
have several, of which `part=` chooses one. A browser throttles the bytes of a response, so rates are goodput and
converted. Comments are passed over.
"""

from __future__ import annotations

import re

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, choose_part, rate, trace_of
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import Trace

_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_LIST = re.compile(r"(?:[\"']?\b(\w{1,80})[\"']?\s*[:=]\s*)?\[\s*((?:\{[^{}]*\}\s*(?:,\s*)?)+)\]")
MAX_BYTES = 2**20
"""Profiles are written by hand."""
_ENTRY = re.compile(r"\{([^{}]*)\}")
_FIELD = re.compile(r"[\"']?(speed|duration)[\"']?\s*:\s*([^,\s}]+)")


def read(text: Text, options: Options) -> Trace:
    profiles = _profiles(text)
    if not profiles:
        raise TraceError(f"{text.source}: dash.js profiles are lists of {{speed: kbit/s, duration: s}}; there is none")
    labels = [name or "unnamed" for name, _ in profiles]
    chosen = choose_part(text, options.part, labels)
    durations, rates = [], []
    for entry in _ENTRY.finditer(profiles[chosen][1]):
        found = dict(_FIELD.findall(entry[1]))
        if set(found) != {"speed", "duration"}:
            raise TraceError(f"{text.source}: {entry[0][:60]!r} of {labels[chosen]} lacks speed or duration")
        seconds = text.number(1, found["duration"], "duration in s", 0.0)
        if seconds == 0.0:
            raise TraceError(f"{text.source}: {labels[chosen]}: duration is 0; it must be above 0")
        durations.append(seconds)
        rates.append(rate(text, 1, found["speed"], "speed in kbit/s", 1e3))
    part = chosen if len(labels) > 1 else None
    return trace_of(text, "dashjs", durations, rates, goodput=True, part=part, notes=(f"profile {labels[chosen]}",))


def _profiles(text: Text) -> list[tuple[str, str]]:
    """(name, entries) of every list that has speeds."""
    if "profiles" not in text.known:
        content = text.whole() if text.size <= MAX_BYTES else ""
        content = _COMMENT.sub("", content) if "speed" in content else ""
        text.known["profiles"] = [(m[1] or "", m[2]) for m in _LIST.finditer(content) if "speed" in m[2]]
    return text.known["profiles"]


def fits(text: Text) -> bool:
    head = text.first[1]
    if not (text.is_json or head.startswith(("//", "/*", "const ", "let ", "var ", "export ", "module."))):
        return False
    return '"bw"' not in head[:40] and any(_FIELD.search(entries) for _, entries in _profiles(text))


FORMAT = Format(
    name="dashjs",
    unit="kbit/s of application bytes",
    edge="duration (s), explicit",
    kind="capacity",
    fits=fits,
    read=read,
    takes=("part",),
)
