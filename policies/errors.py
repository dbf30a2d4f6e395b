"""The error that every bad policy or policy setting raises."""

from __future__ import annotations


class PolicyError(ValueError):
    """A policy that cannot be found, built or trusted; the message says what, where and what to do."""
