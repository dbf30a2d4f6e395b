"""The error raised for every invalid trace."""

from __future__ import annotations


class TraceError(ValueError):
    """A trace that cannot be read or used; the message says what, where and what to do."""
