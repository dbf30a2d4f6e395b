"""How far contexts lie from the text for which their codec was calibrated: what manifests and runs say of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from kvstream.codec.api import Shift

MAX_SHIFT: Final = 1e6
"""Of each number that a manifest may give."""
FAR_BITS, FAR_ESCAPES, USUAL_ESCAPES = 1.3, 4.0, 100.0
"""A context is far from the calibration with more than so many times its bits, or its escapes and a few more."""


@dataclass(frozen=True, slots=True)
class ShiftInfo:
    """How far a context's chunks lie from the text for which its codec was calibrated: means over the levels."""

    times_bits: float
    """The bits over those of the calibration's text in chunks of the same lengths."""
    escapes: float
    """Values in a million that the codec's tables could not code."""
    expected_escapes: float
    """The same of the calibration's text."""

    @property
    def is_far(self) -> bool:
        """Whether chunks are no longer what the codec was calibrated for, and a level may lose more than it says."""
        return self.times_bits > FAR_BITS or self.escapes > FAR_ESCAPES * (self.expected_escapes + USUAL_ESCAPES)

    def __str__(self) -> str:
        escapes = f"{self.escapes:,.0f} escapes in a million values for {self.expected_escapes:,.0f}"
        return f"{self.times_bits:.2f} times the bits of the calibration's text, {escapes}"


class Measured(Protocol):
    """What is read here of a manifest."""

    @property
    def shift(self) -> ShiftInfo | None: ...

    @property
    def measured_on(self) -> str | None: ...


def of_chunks(shifts: Sequence[Shift]) -> ShiftInfo | None:
    """Of the chunks of a level; None where the codec does not say."""
    if not shifts:
        return None
    times = sum(chunk.bits for chunk in shifts) / max(sum(chunk.expected_bits for chunk in shifts), 1e-9)
    escapes = sum(chunk.escapes for chunk in shifts) / len(shifts)
    expected = sum(chunk.expected_escapes for chunk in shifts) / len(shifts)
    return ShiftInfo(min(times, MAX_SHIFT), 1e6 * escapes, 1e6 * expected)


def of_levels(levels: Iterable[ShiftInfo | None]) -> ShiftInfo | None:
    """The mean of what is known of levels."""
    known = [astuple(level) for level in levels if level is not None]
    return ShiftInfo(*(sum(values) / len(known) for values in zip(*known, strict=True))) if known else None


def lines(manifests: Mapping[tuple[str, str], Measured]) -> list[str]:
    """One for each (context, codec) that is far from what the codec was calibrated for."""
    return [
        f"{context} is unlike the text for which {codec} was calibrated: {found.shift}; distortions are those of "
        f"{found.measured_on or 'other text'}"
        for (context, codec), found in manifests.items()
        if found.shift is not None and found.shift.is_far
    ]


def facts(manifests: Mapping[tuple[str, str], Measured]) -> dict[str, dict[str, Any]]:
    """For a run's manifest: [context][codec], how far it lies from the calibration, and what was measured on what."""
    found: dict[str, dict[str, Any]] = {}
    for (context, codec), manifest in manifests.items():
        if manifest.shift is not None or manifest.measured_on is not None:
            shift = None if manifest.shift is None else asdict(manifest.shift) | {"is_far": manifest.shift.is_far}
            found.setdefault(context, {})[codec] = {"shift": shift, "measured_on": manifest.measured_on}
    return found
