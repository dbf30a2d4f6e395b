"""Draw docs/images/architecture.svg from the code's imports: the rooms, what is in them, who imports whom.

    python scripts/draw_architecture.py [--check]

`--check` writes nothing and exits with 1 when the picture is out of date.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
ABOUT = {
    "testbed": "network, processes, experiments",
    "codec": "KV tensors to bytes and back",
    "policies": "which level comes next",
    "traces": "what a link does over time",
}
PLACES = {
    "testbed": (20, 20, 860, 0),
    "codec": (20, 300, 420, 1),
    "policies": (460, 300, 420, 1),
    "traces": (460, 520, 420, 2),
}
"""Room: left, top, width, and the row it stands in."""
HEIGHTS = {"testbed": 220, "codec": 160, "policies": 160, "traces": 120}
LINE = 18


def modules(room: str) -> list[str]:
    """Modules and subpackages of a room, subpackages with a slash."""
    folder = ROOT / room
    files = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")]
    packages = [f"{path.parent.name}/" for path in folder.glob("*/__init__.py")]
    return sorted(packages) + sorted(files)


def imports(file: Path) -> set[str]:
    """Top-level names that a file imports, however deep in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def edges() -> set[tuple[str, str]]:
    """(room, room that a file of it imports)."""
    return {
        (room, other)
        for room in ABOUT
        for file in (ROOT / room).rglob("*.py")
        for other in imports(file) & set(ABOUT)
        if other != room
    }


def libraries(room: str) -> list[str]:
    """Third-party packages that a room imports anywhere."""
    found: set[str] = set()
    for file in (ROOT / room).rglob("*.py"):
        found |= imports(file)
    return sorted(found - set(sys.stdlib_module_names) - set(ABOUT) - {"kvstream"})


def wrapped(words: list[str], width: int) -> list[str]:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 2 + len(word) > width:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    return lines


def room_box(room: str) -> list[str]:
    left, top, width, _ = PLACES[room]
    height = HEIGHTS[room]
    parts = [
        f'<rect class="room" x="{left}" y="{top}" width="{width}" height="{height}" rx="6"/>',
        f'<text class="name" x="{left + 14}" y="{top + 26}">{room}/</text>',
        f'<text class="about" x="{left + width - 14}" y="{top + 26}" text-anchor="end">{escape(ABOUT[room])}</text>',
    ]
    lines = wrapped(modules(room), (width - 28) // 7)
    for number, line in enumerate(lines):
        y = top + 50 + number * LINE
        parts.append(f'<text class="module" x="{left + 14}" y="{y}" xml:space="preserve">{escape(line)}</text>')
    uses = wrapped(["uses", *libraries(room)], (width - 28) // 7)
    for number, line in enumerate(reversed(uses)):
        y = top + height - 12 - number * LINE
        parts.append(f'<text class="about" x="{left + 14}" y="{y}" xml:space="preserve">{escape(line)}</text>')
    if 50 + (len(lines) + len(uses)) * LINE > height:
        raise SystemExit(f"{room}/ has more modules than its box holds; raise HEIGHTS[{room!r}]")
    return parts


def arrow(above: str, below: str) -> str:
    """An arrow from the lower edge of one room to the one that it imports."""
    left, top, width, row = PLACES[below]
    a_left, a_top, a_width, a_row = PLACES[above]
    bottom = a_top + HEIGHTS[above]
    if row - a_row > 1:  # past the room between: down the outer edge
        side = left + width + 20
        path = f"M {side - 34} {bottom} V {bottom + 14} H {side} V {top + HEIGHTS[below] // 2} H {left + width + 7}"
    else:
        x = (max(left, a_left) + min(left + width, a_left + a_width)) // 2
        path = f"M {x} {bottom} V {top - 7}"
    return f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def draw() -> str:
    """The picture as SVG text; the same code gives the same bytes."""
    parts = [part for room in ABOUT for part in room_box(room)]
    parts += [arrow(above, below) for above, below in sorted(edges())]
    style = (
        "text{font-family:ui-sans-serif,system-ui,sans-serif;fill:#1c2530}.name{font-size:18px;font-weight:600}"
        ".about{font-size:12px;fill:#52606d}.module{font-family:ui-monospace,monospace;font-size:11.5px}"
        ".room{fill:#f4f6f8;stroke:#52606d}.arrow{fill:none;stroke:#52606d;stroke-width:1.5}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#52606d"/></marker>'
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 660" role="img" aria-labelledby="title">',
            '<title id="title">The four rooms of kvstream and their imports</title>',
            f"<style>{style}</style><defs>{head}</defs>",
            '<rect width="920" height="660" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


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
