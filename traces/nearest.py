"""What someone may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean seed?` where a known name is close, else what there is: `choose from depth, seed`, or the text
    `otherwise`."""
    names = list(known)
    cased = {one.lower(): one for one in names}
    if close := difflib.get_close_matches(name.lower(), cased, n=2):
        return f"did you mean {' or '.join(cased[one] for one in close)}?"
    return otherwise or (f"choose from {', '.join(names)}" if names else "there are none")
