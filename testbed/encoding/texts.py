"""The texts on which codecs are calibrated and judged; `scripts/calibration_text.py` names sources and licences."""

from __future__ import annotations

import hashlib
import lzma
import random
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed.errors import SpecError

FOLDER = Path(__file__).parent / "calibration"
FIT = ("fit", "fit", "fit-language", "fit", "fit", "fit-random", "fit", "fit-language")
"""The text of each calibration context, over and over: mostly prose and code, for what a model is mostly used for; and
what else may come, because a basis that has never seen it spends three times the bits on it."""
CHECKS = ("check", "check-prose", "check-language", "check-random")
"""Texts to judge by: like the calibration's; other English prose; languages and characters that it did not have."""
_SEEDS = {"fit-random": 1, "check-random": 2}
_LINES, _LINE, _DOCUMENTS = 120, 79, 8
_UNSEEN = 0.05
"""How often a pair of bytes counts as seen that a text does not have."""


def fit_texts(seed: int) -> tuple[bytes, ...]:
    """The documents of which the calibration's context of this number is made."""
    return documents(FIT[seed % len(FIT)])


@cache
def documents(name: str) -> tuple[bytes, ...]:
    """The documents of a text, in UTF-8. Raises SpecError for an unknown one."""
    if name in _SEEDS:
        draw = random.Random(_SEEDS[name])
        return tuple(b"".join(_random_line(draw) for _ in range(_LINES)) for _ in range(_DOCUMENTS))
    if name not in (*FIT, *CHECKS):
        raise SpecError(f"unknown text {name!r}; choose from {', '.join(CHECKS)}")
    return tuple(lzma.decompress((FOLDER / f"{name}.txt.xz").read_bytes()).split(b"\0"))


def digest(name: str) -> str:
    """What changes when the text does."""
    whole = b"\0".join(documents(name)) if name in _SEEDS else (FOLDER / f"{name}.txt.xz").read_bytes()
    return hashlib.sha256(whole).hexdigest()


def kind_of(text: bytes) -> str:
    """The one of `CHECKS` that is most like a text: whose pairs of bytes would code it shortest."""
    pairs = _pairs(text)
    return min(CHECKS, key=lambda name: float((pairs * _bits_of_pairs(name)).sum()))


@cache
def _bits_of_pairs(name: str) -> NDArray[np.float64]:
    """float64 `[256, 256]`: bits of a byte behind each other byte, as often as they are in a text."""
    seen = _pairs(b"\n".join(documents(name))) + _UNSEEN
    return np.log2(seen.sum(axis=1, keepdims=True) / seen)


def _pairs(text: bytes) -> NDArray[np.float64]:
    """float64 `[256, 256]`: how often a byte follows another."""
    values = np.frombuffer(text, np.uint8).astype(np.int64)
    return np.bincount(256 * values[:-1] + values[1:], minlength=1 << 16).astype(np.float64).reshape(256, 256)


def _random_line(draw: random.Random) -> bytes:
    return bytes(draw.choices(range(0x20, 0x7F), k=_LINE)) + b"\n"
