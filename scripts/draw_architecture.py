"""Draw docs/images/architecture.svg from the code's imports: the rooms, floor upon floor, and what each imports.

    python scripts/draw_architecture.py [--check]

`--check` writes nothing and exits with 1 if the picture is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from scripts.imports import FLOORS, libraries, room_edges  # noqa: E402  # the repository's own, wherever this is called

PICTURE = ROOT / "docs" / "images" / "architecture.svg"
ABOUT = {
    "commands": "the command line, one file per group",
    "dashboard": "the live page",
    "lab": "the course",
    "report": "figures and pages of a run",
    "run": "carries out an experiment: emulated or simulated",
    "requests": "many requests in time",
    "receiver": "the receiving process",
    "encoding": "contexts to encoded chunks",
    "connectors": "doors to other engines",
    "simulator": "sessions in virtual time",
    "engine": "runs the model, decodes on a device",
    "results": "a run's files, and what they say",
    "workloads": "what is streamed, and when",
    "models": "language models by name",
    "net": "bytes between the two ends",
    "config": "text to objects",
    "session": "the state machine of a transfer",
    "emulator": "the link",
    "store": "contexts on disk, in buckets",
    "host": "this machine, its processes",
    "cli": "entry point",
    "events": "what a run reports",
    "errors": "typed errors",
    "files": "files read and written",
    "terminal": "output of any kind",
}
PACKAGES = {
    "policies": "which level comes next",
    "codec": "KV tensors to bytes and back",
    "traces": "what a link does over time",
}
COLOURS = {"policies": "#3b6fd4", "codec": "#c2621b", "traces": "#2f8f5b"}
ALONE = {"cli", "events", "errors", "files", "terminal"}
"""Modules, not folders."""

WIDTH = 960
MARGIN = 20
PADDING = 12
GAP = 8
LINE = 16
LETTER = 6.1
"""Width of a character of the small text."""
TAB = 108
"""Where a room's job begins, right of its name."""
Word = tuple[str, str]
"""Text and its class."""


def drawn_floors() -> list[list[str]]:
    """The floors with the rooms that exist."""
    there = {room for room in ABOUT if (ROOT / "testbed" / room).is_dir() or room in ALONE}
    return [rooms for floor in FLOORS if (rooms := [room for room in floor if room in there])]


def imported(room: str) -> tuple[list[str], list[str]]:
    """(rooms of `testbed/`, packages) that a room of `testbed/` imports; the ground, which all import, is left out."""
    names = {other for room_, other in room_edges() if room_ == f"testbed/{room}"}
    inside = [name for floor in FLOORS for name in floor if f"testbed/{name}" in names and name not in ALONE]
    return inside, [name for name in PACKAGES if name in names]


def flow(words: Sequence[Word], width: float) -> list[list[Word]]:
    """Lines of words, none wider than `width`."""
    lines: list[list[Word]] = [[]]
    used = 0.0
    for text, kind in words:
        needs = (len(text) + 2) * LETTER
        if lines[-1] and used + needs > width:
            lines.append([])
            used = 0.0
        lines[-1].append((text, kind))
        used += needs
    return [line for line in lines if line]


def details(room: str, width: float) -> list[list[Word]]:
    """Lines below a room's name: rooms that it imports, then third-party packages."""
    inside, _ = imported(room)
    words = [(name, "import") for name in inside]
    words += [(name, "library") for name in libraries(f"testbed/{room}")]
    return flow(words, width - 2 * PADDING)


def text_line(words: Sequence[Word], x: float, y: float) -> str:
    spans = "".join(
        f'<tspan class="{kind}" dx="{0 if n == 0 else 9}">{escape(text)}</tspan>'
        for n, (text, kind) in enumerate(words)
    )
    return f'<text x="{x:g}" y="{y:g}">{spans}</text>'


def box(room: str, left: float, top: float, width: float, height: float) -> Iterator[str]:
    """A room of `testbed/`: name, job, dots for the packages that it imports, and what else it imports."""
    yield f'<rect class="room" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="5"/>'
    name = room if room in ALONE else f"{room}/"
    yield f'<text class="name" x="{left + PADDING:g}" y="{top + 20:g}">{name}</text>'
    yield f'<text class="about" x="{left + PADDING + TAB:g}" y="{top + 20:g}">{escape(ABOUT[room])}</text>'
    for number, package in enumerate(reversed(imported(room)[1])):
        x = left + width - PADDING - 4 - 13 * number
        yield f'<circle cx="{x:g}" cy="{top + 16:g}" r="4.5" fill="{COLOURS[package]}"/>'
    for number, line in enumerate(details(room, width)):
        yield text_line(line, left + PADDING, top + 38 + number * LINE)


def package_box(package: str, left: float, top: float, width: float, height: float) -> Iterator[str]:
    colour = COLOURS[package]
    yield (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="8" fill="{colour}" '
        f'fill-opacity="0.08" stroke="{colour}"/>'
    )
    yield f'<circle cx="{left + 18:g}" cy="{top + 20:g}" r="5.5" fill="{colour}"/>'
    yield f'<text class="package" x="{left + 32:g}" y="{top + 26:g}">{package}/</text>'
    yield f'<text class="about" x="{left + PADDING:g}" y="{top + 48:g}">{escape(PACKAGES[package])}</text>'
    words = [(name, "library") for name in libraries(package)]
    for number, line in enumerate(flow(words, width - 2 * PADDING)):
        yield text_line(line, left + PADDING, top + 68 + number * LINE)


def draw() -> str:
    """The picture as SVG text; the same code gives the same bytes."""
    inner = WIDTH - 2 * MARGIN - 2 * PADDING
    top = float(MARGIN + 62)
    parts: list[str] = []
    for floor in drawn_floors():
        width = (inner - GAP * (len(floor) - 1)) / len(floor)
        height = 30 + LINE * max(len(details(room, width)) for room in floor)
        for number, room in enumerate(floor):
            parts += box(room, MARGIN + PADDING + number * (width + GAP), top, width, height)
        top += height + GAP
    bottom = top - GAP + PADDING
    panel = [
        f'<rect class="panel" x="{MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{bottom - MARGIN:g}"/>',
        f'<text class="package" x="{MARGIN + PADDING}" y="{MARGIN + 26}">testbed/</text>',
        text_line(
            [
                ("A room imports only from floors below its own:", "about"),
                ("rooms", "import"),
                ("third-party packages", "library"),
                ("and, as dots, the packages at the foot.", "about"),
            ],
            MARGIN + PADDING,
            MARGIN + 47,
        ),
    ]
    foot = bottom + 34
    width = (WIDTH - 2 * MARGIN - 2 * 24) / 3
    for number, package in enumerate(PACKAGES):
        left = MARGIN + number * (width + 24)
        parts += package_box(package, left, foot, width, 96)
        parts.append(arrow(left + width / 2, bottom, left + width / 2, foot))
    order = list(PACKAGES)
    for above, below in sorted(room_edges()):
        if above in PACKAGES and below in PACKAGES:
            parts.append(under(order.index(above), order.index(below), width, foot + 96))
    height = foot + 96 + 34
    style = (
        "text{font-family:ui-sans-serif,system-ui,sans-serif;fill:#1c2530}"
        ".package{font-size:17px;font-weight:650}.name{font-size:14px;font-weight:600}"
        ".about{font-size:12px;fill:#52606d}"
        ".import,.library{font-family:ui-monospace,monospace;font-size:10.5px}"
        ".import{fill:#334155}.library{fill:#a1495f;font-style:italic}"
        ".panel{fill:#f1f4f7;stroke:#9aa7b4;rx:8px}.room{fill:#ffffff;stroke:#c9d2db}"
        ".arrow{fill:none;stroke:#52606d;stroke-width:1.5}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#52606d"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            "<title>The rooms of kvstream, floor upon floor, and their imports</title>",
            f"<style>{style}</style><defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
            *panel,
            *parts,
            "</svg>\n",
        ]
    )


def arrow(x: float, top: float, end: float, bottom: float) -> str:
    return f'<path class="arrow" d="M {x:g} {top:g} L {end:g} {bottom - 2:g}" marker-end="url(#head)"/>'


def under(above: int, below: int, width: float, foot: float) -> str:
    """An arrow from one package to another, below those between."""
    x = [MARGIN + number * (width + 24) + width / 2 for number in (above, below)]
    way = f"M {x[0]:g} {foot:g} V {foot + 18:g} H {x[1]:g} V {foot + 2:g}"
    return f'<path class="arrow" d="{way}" marker-end="url(#head)"/>'


def main(arguments: list[str]) -> int:
    picture = draw()
    if arguments == ["--check"]:
        if not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
            print(f"{PICTURE.relative_to(ROOT)} is out of date; run: python scripts/draw_architecture.py")
            return 1
        return 0
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture, encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
