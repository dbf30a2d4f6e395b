"""The error raised for every invalid policy or policy setting."""

from __future__ import annotations


class PolicyError(ValueError):
    """A policy that cannot be found, built or used; the message says what, where and what to do."""
