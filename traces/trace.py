"""A bandwidth trace: rates over time, exact bits by any time, and the time that any number of bits needs.

Row ``i`` holds ``rates_bps[i]`` from the end of row ``i - 1`` for ``durations_s[i]`` seconds. Rates are
layer-2 capacity in bit/s, piecewise constant. Bits are kept as prefix sums, so that both the integral and its
inverse are one binary search (the idea of MIT 6.829's simulator); the scalar forms stay near a microsecond.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args, overload

import numpy as np

from kvstream.traces.columns import Floats, checked_column, sequence
from kvstream.traces.errors import TraceError
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.provenance import Provenance as Provenance

End = Literal["loop", "hold", "stop"]
Kind = Literal["capacity", "achieved"]
Per = Literal["time", "chunk"]

MAX_ROWS = 20_000_000
MAX_RATE_BPS = 1e14
MIN_ROW_S = 1e-9


@dataclass(frozen=True, eq=False)
class Trace:
    """What a link carries over time. Arrays are read-only, writeable ones copied; traces of equal content are equal.

    ``durations_s`` and ``rates_bps`` are float64 of one length n >= 1: seconds (> 0), bit/s at layer 2 (>= 0).
    ``end`` says what follows the last row: ``loop`` starts again, ``hold`` keeps the last rate, ``stop`` sends
    nothing more. ``kind`` is ``capacity`` for what the link could carry, ``achieved`` for what some sender got.
    ``per="chunk"`` holds one rate per chunk instead: the link steps to ``chunk_rate(i)`` as chunk i's first byte
    leaves. Such a trace has no time axis: ``durations_s`` is empty and methods about time raise TraceError.
    ``delay_s`` (one way, seconds) and ``loss`` (a fraction of packets) are optional columns of length n.
    ``story`` says in a sentence or two what the link goes through, for people; like the name, it is a label.
    """

    name: str
    durations_s: Floats
    rates_bps: Floats
    end: End = "loop"
    kind: Kind = "capacity"
    per: Per = "time"
    provenance: tuple[Provenance, ...] = ()
    delay_s: Floats | None = None
    loss: Floats | None = None
    story: str = ""
    _edges: Sequence[float] = field(init=False, repr=False)
    _bits: Sequence[float] = field(init=False, repr=False)
    _rates: Sequence[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for what, allowed in (("end", End), ("kind", Kind), ("per", Per)):
            value, choices = getattr(self, what), get_args(allowed)
            if value not in choices:
                raise TraceError(f"trace {self.name!r}: {what}={str(value)[:60]!r}; choose from {', '.join(choices)}")
        rates = checked_column(self.name, "rates_bps", self.rates_bps, 0.0, MAX_RATE_BPS)
        n = len(rates)
        if not 1 <= n <= MAX_ROWS:
            raise TraceError(f"trace {self.name!r} has {n} rows; a trace has 1 to {MAX_ROWS}")
        length = n if self.per == "time" else 0
        durations = checked_column(self.name, "durations_s", self.durations_s, MIN_ROW_S, math.inf, length)
        for what in ("delay_s", "loss"):
            values = getattr(self, what)
            if values is not None:
                top = 1.0 if what == "loss" else math.inf
                object.__setattr__(self, what, checked_column(self.name, what, values, 0.0, top, n))
        edges, bits = np.zeros(len(durations) + 1), np.zeros(len(durations) + 1)
        with np.errstate(over="ignore"):  # an overflow is an infinity, refused below
            np.cumsum(durations, out=edges[1:])
            np.multiply(durations, rates[: len(durations)], out=bits[1:])
            np.cumsum(bits[1:], out=bits[1:])
        if not math.isfinite(edges[-1] + bits[-1]):
            raise TraceError(f"trace {self.name!r} is too long: its length or its bits overflow")
        if not (rising := edges[1:] > edges[:-1]).all():
            row = int(np.argmin(rising))
            lost = f"durations_s[{row}] = {durations[row]:g} s is lost after {edges[row]:g} s"
            raise TraceError(f"trace {self.name!r}: {lost}")
        for attribute, content in (
            ("rates_bps", rates),
            ("durations_s", durations),
            ("_edges", sequence(edges)),
            ("_bits", sequence(bits)),
            ("_rates", sequence(rates)),
        ):
            object.__setattr__(self, attribute, content)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, one.name) for one in fields(self) if one.init)

    # ---- what it is

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: rows, end, kind, per. The name and the provenance are labels and stay out."""
        digest = hashlib.sha256(f"kvstream-trace-1 {self.end} {self.kind} {self.per} {len(self)}".encode())
        for column in (self.durations_s, self.rates_bps, self.delay_s, self.loss):
            digest.update(b"-" if column is None else b"+")
            if column is not None:
                digest.update(column.astype("<f8", copy=False).data)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.sha256 == other.sha256 if isinstance(other, Trace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __len__(self) -> int:
        return len(self._rates)

    @property
    def duration_s(self) -> float:
        """Length of all rows, in seconds."""
        self._needs_time("duration_s")
        return self._edges[-1]

    @property
    def mean_bps(self) -> float:
        """Mean rate over one pass of the rows (over the chunks for ``per="chunk"``)."""
        if self.per == "chunk":
            return float(np.mean(self.rates_bps))
        return self._bits[-1] / self._edges[-1]

    @property
    def mean_delay_s(self) -> float:
        """Mean of ``delay_s`` over one pass of the rows (over the chunks for ``per="chunk"``); 0 without the column."""
        if self.delay_s is None:
            return 0.0
        return float(np.average(self.delay_s, weights=self.durations_s if self.per == "time" else None))

    @property
    def peak_bps(self) -> float:
        """Highest rate of any row."""
        return float(np.max(self.rates_bps))

    # ---- what it carries

    def row_at(self, t_s: float) -> int | None:
        """Index of the row in force at ``t_s`` (from its start, its end excluded); None once stopped."""
        self._needs_time("row_at")
        position = self._position(t_s)
        if position >= self._edges[-1]:
            return None if self.end == "stop" else len(self._rates) - 1
        return bisect_right(self._edges, position) - 1

    def rate_at(self, t_s: float) -> float:
        """Rate in bit/s at ``t_s`` seconds."""
        row = self.row_at(t_s)
        return 0.0 if row is None else self._rates[row]

    @overload
    def bits_by(self, t_s: float) -> float: ...
    @overload
    def bits_by(self, t_s: Floats) -> Floats: ...
    def bits_by(self, t_s: float | Floats) -> float | Floats:
        """Bits carried from time 0 to ``t_s``: the exact integral of the rate. Arrays give arrays."""
        length = self._edges[-1]
        if isinstance(t_s, (float, int)) and 0.0 <= t_s < length:  # the usual case
            return self._bits_within(t_s)
        self._needs_time("bits_by")
        if not isinstance(t_s, (float, int)):
            return self._bits_by_array(np.asarray(t_s, dtype=np.float64))
        if not 0.0 <= t_s < math.inf:
            raise TraceError(f"trace {self.name!r}: time {t_s} s; times must be finite and not negative")
        if self.end == "loop":
            passes, t_s = divmod(t_s, length)
            return passes * self._bits[-1] + self._bits_within(t_s)
        return self._bits[-1] + (self._rates[-1] * (t_s - length) if self.end == "hold" else 0.0)

    def _bits_within(self, t_s: float) -> float:
        row = bisect_right(self._edges, t_s) - 1
        if row >= len(self._rates):
            return self._bits[-1]
        return self._bits[row] + self._rates[row] * (t_s - self._edges[row])

    def _bits_by_array(self, t_s: Floats) -> Floats:
        if not np.all(np.isfinite(t_s) & (t_s >= 0.0)):
            raise TraceError(f"trace {self.name!r}: times must be finite and not negative")
        edges, bits = np.asarray(self._edges), np.asarray(self._bits)
        length = self._edges[-1]
        passes, within = np.divmod(t_s, length) if self.end == "loop" else (np.zeros_like(t_s), t_s)
        inside = np.minimum(within, length)
        row = np.minimum(np.searchsorted(edges, inside, side="right") - 1, len(self._rates) - 1)
        total = passes * bits[-1] + bits[row] + self.rates_bps[row] * (inside - edges[row])
        return total + self._rates[-1] * (within - inside) if self.end == "hold" else total

    def time_for(self, bits: float, start_s: float) -> float:
        """Seconds from ``start_s`` until ``bits`` more bits have been carried; inf if that never happens.

        The inverse of bits_by: the smallest d with ``bits_by(start_s + d) - bits_by(start_s) >= bits``.
        """
        edges, sums = self._edges, self._bits
        if not (bits > 0.0 and 0.0 <= start_s < math.inf):
            self._needs_time("time_for")
            if bits != 0.0 or not 0.0 <= start_s < math.inf:
                raise TraceError(f"trace {self.name!r}: time_for({bits} bits, {start_s} s); neither may be negative")
            return 0.0
        length, total = edges[-1], sums[-1]
        if self.end == "loop":
            self._needs_time("time_for")
            if total == 0.0 or bits == math.inf:
                return math.inf
            start_s = start_s % length if start_s >= length else start_s
            target = self._bits_within(start_s) + bits
            if target <= total:
                return max(self._when(target) - start_s, 0.0)
            passes, target = divmod(target, total)
            if target == 0.0:
                # The last bit leaves within the pass before, not after zero rates that may open the next.
                passes, target = passes - 1.0, total
            return passes * length + self._when(target) - start_s
        self._needs_time("time_for")
        last = self._rates[-1] if self.end == "hold" else 0.0
        if start_s >= length:
            return bits / last if last > 0.0 else math.inf
        target = self._bits_within(start_s) + bits
        if target <= total:
            return max(self._when(target) - start_s, 0.0)
        return (length - start_s) + (target - total) / last if last > 0.0 else math.inf

    def times_for(self, bits: Sequence[float], start_s: float) -> list[float]:
        """`time_for` of several numbers of bits above 0, ascending, from one start: the start is looked up once."""
        edges, sums, rates = self._edges, self._bits, self._rates
        if 0.0 <= start_s < edges[-1]:
            row = bisect_right(edges, start_s) - 1
            base = sums[row] + rates[row] * (start_s - edges[row])
            if base + bits[-1] <= sums[-1]:
                found = []
                for some in bits:
                    target = base + some
                    row = bisect_left(sums, target, row) - 1
                    found.append(edges[row] + (target - sums[row]) / rates[row] - start_s)
                return found
        return [self.time_for(some, start_s) for some in bits]

    def _when(self, target: float) -> float:
        """The first time within one pass at which ``0 < target <= total`` bits have gone."""
        row = bisect_left(self._bits, target) - 1
        return self._edges[row] + (target - self._bits[row]) / self._rates[row]

    def chunk_rate(self, chunk: int) -> float:
        """Rate in bit/s while this chunk is sent (``per="chunk"`` only); past the last row, as ``end`` says."""
        if self.per != "chunk":
            raise TraceError(f"trace {self.name!r} is over time; chunk_rate is for per=chunk")
        n = len(self._rates)
        if chunk < 0:
            raise TraceError(f"trace {self.name!r}: chunk {chunk}; chunks are numbered from 0")
        if chunk >= n and self.end == "stop":
            return 0.0
        return self._rates[chunk % n if self.end == "loop" else min(chunk, n - 1)]

    def changes(self, start_s: float, length_s: float) -> list[tuple[float, float]]:
        """The rate steps a shaper makes from ``start_s`` for ``length_s``: (seconds after start_s, bit/s).

        The first is at 0; neighbours of equal rate are one step.
        """
        steps: list[tuple[float, float]] = []
        for at_s, _, row in self._rows(start_s, length_s):
            rate = 0.0 if row is None else self._rates[row]
            if not steps or steps[-1][1] != rate:
                steps.append((at_s, rate))
        return steps

    def _rows(self, start_s: float, length_s: float) -> Iterator[tuple[float, float, int | None]]:
        """(start relative to start_s, duration, row or None once stopped) over the window, in order."""
        self._needs_time("a window")
        if not 0.0 < length_s < math.inf:
            raise TraceError(f"trace {self.name!r}: window of {length_s} s; give a finite length above 0 s")
        if length_s / self._edges[-1] * len(self._rates) > MAX_ROWS and self.end == "loop":
            raise TraceError(f"trace {self.name!r}: {length_s} s of it are more than {MAX_ROWS} rows; ask for less")
        position, done, n = self._position(start_s), 0.0, len(self._rates)
        row = bisect_right(self._edges, position) - 1
        while done < length_s:
            if row >= n and self.end == "loop":
                row, position = 0, 0.0
            if row >= n:
                yield done, length_s - done, None if self.end == "stop" else n - 1
                return
            span = min(self._edges[row + 1] - position, length_s - done)
            if span > 0.0:
                yield done, span, row
            done += span
            position, row = self._edges[row + 1], row + 1

    def _position(self, t_s: float) -> float:
        if not 0.0 <= t_s < math.inf:
            raise TraceError(f"trace {self.name!r}: time {t_s} s; times must be finite and not negative")
        return math.fmod(t_s, self._edges[-1]) if self.end == "loop" else t_s

    def _needs_time(self, what: str) -> None:
        if self.per == "chunk":
            raise TraceError(f"trace {self.name!r} has one rate per chunk and no time axis: {what} needs per=time")

    # ---- traces made from it

    def _derived(self, transform: str, **fields: Any) -> Trace:
        records = self.provenance or (Provenance(source=self.name, format="made in memory"),)
        noted = tuple(replace(record, transforms=(*record.transforms, transform)) for record in records)
        return replace(self, provenance=noted, **fields)

    def _window(self, start_s: float, length_s: float) -> dict[str, Floats | None]:
        rows = list(self._rows(start_s, length_s))
        if len(rows) > 1:  # a cut beside an edge leaves a sliver of rounding
            rows = [row for row in rows if row[1] >= 2.0 * MIN_ROW_S]
        index = np.array([len(self._rates) - 1 if row is None else row for _, _, row in rows])
        rates = self.rates_bps[index]
        rates[[row is None for _, _, row in rows]] = 0.0
        return {
            "durations_s": np.array([span for _, span, _ in rows]),
            "rates_bps": rates,
            "delay_s": None if self.delay_s is None else self.delay_s[index],
            "loss": None if self.loss is None else self.loss[index],
        }

    def renamed(self, name: str) -> Trace:
        """The same trace under another name."""
        return replace(self, name=name)

    def without(self, column: str) -> Trace:
        """The same rows without a column: `delay` or `loss`."""
        name = {"delay": "delay_s", "loss": "loss"}.get(column)
        if name is None:
            raise TraceError(f"trace {self.name!r}: {column[:60]!r} cannot be dropped; choose from delay, loss")
        if getattr(self, name) is None:
            return self
        return self._derived(f"{column} dropped", **{name: None})

    def with_end(self, end: End) -> Trace:
        """The same rows with another end."""
        return self._derived(f"end {end}", end=end)

    def scaled(self, factor: float) -> Trace:
        """Every rate times ``factor``."""
        if not 0.0 < factor < math.inf:
            raise TraceError(f"trace {self.name!r}: scale factor {factor}; give a finite number above 0")
        with np.errstate(over="ignore"):
            return self._derived(f"scaled x{factor:.9g}", rates_bps=self.rates_bps * factor)

    def scale_to(self, *, mean_bps: float | None = None, peak_bps: float | None = None) -> Trace:
        """Scaled so that the mean, or the peak, becomes the given rate in bit/s."""
        if (mean_bps is None) == (peak_bps is None):
            raise TraceError("scale_to takes one of mean_bps and peak_bps")
        target, now = (mean_bps, self.mean_bps) if mean_bps is not None else (peak_bps, self.peak_bps)
        if now == 0.0:
            raise TraceError(f"trace {self.name!r} is zero everywhere: it cannot be scaled to a rate")
        return self.scaled(cast(float, target) / now)

    def clipped(self, low_bps: float = 0.0, high_bps: float = MAX_RATE_BPS) -> Trace:
        """Every rate brought into [low_bps, high_bps]."""
        if not 0.0 <= low_bps <= high_bps:
            raise TraceError(f"trace {self.name!r}: clip to {low_bps}..{high_bps} bit/s; low must not exceed high")
        rates_bps = np.clip(self.rates_bps, low_bps, high_bps)
        return self._derived(f"clipped {low_bps:.9g}..{high_bps:.9g} bit/s", rates_bps=rates_bps)

    def sliced(self, start_s: float, length_s: float) -> Trace:
        """The rows from ``start_s`` for ``length_s`` seconds, past the last row as ``end`` says. The end stays."""
        return self._derived(f"sliced {start_s:.9g}+{length_s:.9g} s", **self._window(start_s, length_s))

    def shifted(self, offset_s: float) -> Trace:
        """The link as seen from a later start: ``shifted(o).bits_by(t) == bits_by(o + t) - bits_by(o)``."""
        self._needs_time("shifted")
        length = self._edges[-1]
        if self.end != "loop" and offset_s >= length:
            if self.end == "stop":
                raise TraceError(f"trace {self.name!r} stops at {length:g} s: no start offset of {offset_s:g} s")
            start, left = length - float(self.durations_s[-1]), float(self.durations_s[-1])
        else:
            start = self._position(offset_s)
            left = length if self.end == "loop" else length - start
        return self._derived(f"shifted {offset_s:.9g} s", **self._window(start, left))

    def stretched(self, factor: float) -> Trace:
        """Every duration times ``factor``; the rates stay."""
        self._needs_time("stretched")
        if not 0.0 < factor < math.inf:
            raise TraceError(f"trace {self.name!r}: stretch factor {factor}; give a finite number above 0")
        with np.errstate(over="ignore"):
            return self._derived(f"stretched x{factor:.9g}", durations_s=self.durations_s * factor)

    def resampled(self, step_s: float) -> Trace:
        """Rows of ``step_s`` seconds that carry the same bits; delay and loss become means over a step.

        With ``end="hold"`` one more row keeps the held rate what it was when the last step mixed several.
        """
        self._needs_time("resampled")
        if not 0.0 < step_s < math.inf or self._edges[-1] / step_s > MAX_ROWS:
            raise TraceError(f"trace {self.name!r}: step of {step_s} s; give one above 0 s, at most {MAX_ROWS} rows")
        grid = step_s * np.arange(math.floor(self._edges[-1] / step_s + 1e-6) + 1)
        sliver = len(grid) > 1 and self._edges[-1] - grid[-1] < 2.0 * MIN_ROW_S
        grid = np.append(grid[:-1] if sliver else grid, self._edges[-1])
        durations = np.diff(grid)

        def means(column: Floats) -> Floats:
            sums = np.concatenate(([0.0], np.cumsum(self.durations_s * column)))
            mean = np.diff(np.interp(grid, self._edges, sums)) / durations
            return np.clip(mean, column.min(), column.max())

        present = [what for what in ("rates_bps", "delay_s", "loss") if getattr(self, what) is not None]
        columns = {what: means(getattr(self, what)) for what in present}
        if self.end == "hold" and columns["rates_bps"][-1] != self._rates[-1]:
            durations = np.append(durations, step_s)
            columns = {what: np.append(column, getattr(self, what)[-1]) for what, column in columns.items()}
        return self._derived(f"resampled to {step_s:.9g} s", durations_s=durations, **columns)

    def concatenated(self, *others: Trace, name: str | None = None) -> Trace:
        """This trace, then the others, once each; the end is the last one's. Optional columns must agree."""
        parts = (self, *others)
        for part in parts:
            part._needs_time("concatenated")
        columns: dict[str, Floats | None] = {}
        for what in ("durations_s", "rates_bps", "delay_s", "loss"):
            values = [getattr(part, what) for part in parts]
            missing = [part.name for part, value in zip(parts, values, strict=True) if value is None]
            if missing and len(missing) < len(parts):
                raise TraceError(f"cannot concatenate: {missing[0]!r} has no {what} column and another trace has one")
            columns[what] = None if missing else np.concatenate(values)
        joined = name or "+".join(part.name for part in parts)
        records = tuple(
            replace(record, transforms=(*record.transforms, f"part {i + 1} of {len(parts)} of {joined}"))
            for i, part in enumerate(parts)
            for record in part.provenance or (Provenance(source=part.name, format="made in memory"),)
        )
        kind: Kind = "achieved" if any(part.kind == "achieved" for part in parts) else "capacity"
        fields = cast(Any, columns)
        return replace(self, name=joined, end=parts[-1].end, kind=kind, provenance=records, **fields)

    def over_time(self, hold_s: float) -> Trace:
        """A per-chunk trace laid out in time, each rate for ``hold_s`` seconds: another link, and noted as such."""
        if self.per != "chunk":
            raise TraceError(f"trace {self.name!r} is already over time; hold is for a trace with one rate per chunk")
        if not 0.0 < hold_s < math.inf:
            raise TraceError(f"trace {self.name!r}: hold of {hold_s} s; give a finite time above 0 s")
        transform = f"per chunk to per time, each rate held {hold_s:.9g} s"
        return self._derived(transform, per="time", durations_s=np.full(len(self), hold_s))

    def as_goodput(self, mtu_bytes: int = 1500) -> Trace:
        """The application's view: every rate times ``goodput_per_capacity``, for a simulator or an oracle."""
        factor = goodput_per_capacity(mtu_bytes)
        return self._derived(f"capacity to goodput at MTU {mtu_bytes}", rates_bps=self.rates_bps * factor)
