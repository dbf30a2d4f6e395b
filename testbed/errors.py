"""Errors of experiments and machines. Each message says what, where and what to do."""

from __future__ import annotations


class SpecError(ValueError):
    """An experiment, command line or settings string that cannot be used."""


class MachineError(RuntimeError):
    """This machine lacks something the run needs; the message names the line that fixes it."""
