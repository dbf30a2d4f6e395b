"""What decoders can write, and its number in the kernels; below both `sections` and the kernels."""

from __future__ import annotations

KINDS = {"uint8": 0, "float32": 1, "float16": 2, "bfloat16": 3}
"""Symbols (uint8), or reconstructed values by format."""
