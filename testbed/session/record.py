"""The outcome of a session."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from kvstream.policies.api import (
    LevelOrText,
)


@dataclass(slots=True)
class ChunkRecord:
    """What happened to one chunk; a row of `chunks.jsonl`. Times are None until they happen."""

    chunk: int
    level: LevelOrText | None = None
    bytes: int = 0
    request_s: float | None = None
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    decode_start_s: float | None = None
    decode_end_s: float | None = None
    reason: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    """Why the policy's answer was not used; None if it was."""
    attempts: int = 0
    received_bytes: int = 0
    pieces_s: tuple[tuple[float, float], ...] = ()
    """Start and end of each piece's decoding, where pieces are decoded as they arrive; its copy to the device is a part
    of that."""

    @property
    def computing_s(self) -> float | None:
        """What decoding or recomputing took; of pieces, without what came between them. None before its end."""
        if self.decode_start_s is None or self.decode_end_s is None:
            return None
        return sum(end - start for start, end in self.pieces_s) or self.decode_end_s - self.decode_start_s


@dataclass(frozen=True)
class SessionRecord:
    """The outcome of one session."""

    ttft_s: float
    deadline_s: float
    distortion: float
    levels: tuple[LevelOrText, ...]
    bytes: int
    """Bytes of the chunks used, as encoded."""
    wasted_bytes: int
    """Bytes that arrived of chunks that were cancelled or damaged."""
    policy_faults: int
    chunks: tuple[ChunkRecord, ...]

    @property
    def met(self) -> bool:
        return self.ttft_s <= self.deadline_s

    @property
    def goodput_bps(self) -> float | None:
        """What the link carried, from the first chunk's first byte to the last byte; None where nothing took time."""
        first_s = min((one.first_byte_s for one in self.chunks if one.first_byte_s is not None), default=0.0)
        last_s = max((one.last_byte_s for one in self.chunks if one.last_byte_s is not None), default=0.0)
        return 8.0 * (self.bytes + self.wasted_bytes) / (last_s - first_s) if last_s > first_s else None

    def to_json(self) -> dict[str, Any]:
        """As plain values. `dataclasses.asdict` copies every value of every chunk, which takes longer than simulating
        the session."""
        chunks = [{name: getattr(one, name) for name in _CHUNK_FIELDS} for one in self.chunks]
        return {name: getattr(self, name) for name in _FIELDS} | {"chunks": chunks}

    def describe(self) -> str:
        """One line: time, verdict, bytes, levels, distortion."""
        levels = " ".join("t" if level == "text" else str(level) for level in self.levels)
        return (
            f"{self.ttft_s:.3f} s, deadline {self.deadline_s:g} s {'met' if self.met else 'missed'}; "
            f"{self.bytes} bytes, levels {levels}, distortion {self.distortion:.2g} nats"
        )


_FIELDS: Final = tuple(field.name for field in fields(SessionRecord))
_CHUNK_FIELDS: Final = tuple(field.name for field in fields(ChunkRecord))


class SessionFailed(RuntimeError):
    """The transfer could not be completed; the message says why."""
