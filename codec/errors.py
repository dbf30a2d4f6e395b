"""The error that every bad bitstream or codec setting raises."""

from __future__ import annotations


class CodecError(ValueError):
    """A bitstream, profile or codec setting that cannot be used; the message says what, where and what to do."""
