"""Where the rates of a trace come from, and what was done to them since."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """Where the rates of a trace come from.

    ``source`` is a file name, a URL or a generator spec; ``format`` the name of the reader or ``generator``;
    ``licence`` the licence of the data as far as known; ``transforms`` what was done since, oldest first;
    ``sha256`` the hash of the source file's bytes (empty when there is no file); ``chosen`` whether the format was
    ``named`` or ``recognised`` (empty when there was nothing to choose).
    """

    source: str
    format: str
    licence: str = "unknown"
    transforms: tuple[str, ...] = ()
    sha256: str = ""
    chosen: str = ""
