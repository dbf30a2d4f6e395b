"""`kvstream advise`: what compressing a context's cache saves at a bandwidth, and where it stops to.

Each way to have the cache at the receiver (raw, fp8, two codecs, recomputing it from text) is timed at a constant rate:
transfer and compute overlap chunk by chunk, the prompt's prefill follows. Sizes and times come from measurements on a
model (`kvstream.testbed.run.advise_model`), or from a synthetic workload (`kvstream.testbed.workloads.synthetic`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import words
from kvstream.testbed.store.manifest import LevelInfo
from kvstream.testbed.workloads import synthetic
from kvstream.traces.units import format_rate, format_time

CHUNK_TOKENS: Final = 512
RTT_S: Final = 0.001
RATES_BPS: Final = tuple(10 ** (exponent / 8) for exponent in range(5 * 8, 12 * 8 + 1))
"""Where a break-even is looked for, 100 kbit/s to 1 Tbit/s; between two, it is halved in."""
HALVINGS: Final = 30
RAW, RECOMPUTE = "raw", "recompute"


@dataclass(frozen=True)
class Option:
    """A way to have a context's cache at the receiver."""

    name: str
    level: str
    bytes_per_token: float
    distortion: float | None
    """Mean KL (nats); None where it was not measured."""
    decode_s_per_token: float


@dataclass(frozen=True)
class Basis:
    """What the answer is computed from."""

    model: str
    compute: str
    options: tuple[Option, ...]
    """Encoded caches; `raw` is one of them."""
    text_bytes_per_token: float
    forward_s: Callable[[int, int], float]
    """Seconds of a forward pass over tokens [start, stop) of a context."""
    prompt_tokens: int
    about: str
    """Where sizes and times come from."""


def of_workload(text: str) -> Basis:
    """The basis of a synthetic workload such as `mistral-7b,compute=h200`. Raises SpecError."""
    workload = synthetic.parse(text)
    elements = workload.kv.elements_per_token
    cachegen = default_of_cachegen(workload.ladder("cachegen"))
    ours = of_ours(workload.ladder("kvstream"), cachegen)
    levels = [("cachegen", cachegen), *(("kvstream", level) for level in ours)]
    options = (
        Option(RAW, "16 bit", 2.0 * elements, 0.0, 0.0),
        Option("fp8", "8 bit", 1.0 * elements, None, 0.0),
        *(Option(name, x.name, elements * x.bits_per_element / 8, x.distortion, 0.0) for name, x in levels),
    )
    basis = Basis(
        model=workload.model,
        compute="",
        options=options,
        text_bytes_per_token=synthetic.TEXT_BYTES_PER_TOKEN,
        forward_s=workload.forward_s,
        prompt_tokens=workload.prompt,
        about="bits per element and KL as measured on the bundled model, not on this one",
    )
    return on_profile(basis, workload)


def on_profile(basis: Basis, workload: synthetic.Workload) -> Basis:
    """The same with the times of a workload's compute profile."""
    decoded = synthetic.ELEMENT_BYTES * workload.kv.elements_per_token

    def timed(option: Option) -> Option:
        rate = option.name if option.name in ("cachegen", "kvstream") else "copy"
        seconds = decoded / (workload.gpus * synthetic.decode_bytes_per_s(rate, workload.compute))
        return replace(option, decode_s_per_token=seconds)

    return replace(
        basis,
        compute=f"{workload.gpus} {workload.compute}",
        options=tuple(map(timed, basis.options)),
        forward_s=workload.forward_s,
        about=f"{basis.about}; times from data sheets (`{workload.compute}`)",
    )


def default_of_cachegen(ladder: Sequence[LevelInfo]) -> LevelInfo:
    """CacheGen's default level: its bins as they are."""
    return next(level for level in ladder if level.name == "bins x1")


def of_ours(ladder: Sequence[LevelInfo], peer: LevelInfo) -> list[LevelInfo]:
    """The smallest level whose KL is at most the peer's, and the highest one."""
    fitting = [level for level in ladder if level.distortion <= peer.distortion]
    return list(dict.fromkeys([*fitting[:1], ladder[-1]]))


def advise(basis: Basis, tokens: int, bandwidth_bps: float) -> dict[str, Any]:
    """Every option's TTFT (s) at a bandwidth (bit/s of application bytes), and where it breaks even, as JSON values."""
    if not bandwidth_bps > 0.0:
        raise SpecError(f"the bandwidth is {bandwidth_bps:g} bit/s; give one above 0, such as 3Gbps")
    text = Option(RECOMPUTE, "text", basis.text_bytes_per_token, 0.0, 0.0)
    options = [*basis.options, text]
    timed = {option: _ttft(basis, option, tokens) for option in options}
    raw = next(option for option in basis.options if option.name == RAW)
    rows = []
    for option in options:
        rows.append(
            {
                "name": option.name,
                "level": option.level,
                "bytes": round(option.bytes_per_token * tokens),
                "distortion": option.distortion,
                "ttft_s": timed[option](bandwidth_bps),
                "faster_than_raw_below_bps": None if option is raw else last_faster(timed[option], timed[raw]),
                "faster_than_recompute_above_bps": None if option is text else first_faster(timed[option], timed[text]),
            }
        )
    return {
        "model": basis.model,
        "tokens": tokens,
        "bandwidth_bps": bandwidth_bps,
        "compute": basis.compute,
        "about": basis.about,
        "prompt_tokens": basis.prompt_tokens,
        "options": rows,
    }


def _ttft(basis: Basis, option: Option, tokens: int) -> Callable[[float], float]:
    """Seconds to the first token at a rate: what `simulate` gives for chunks requested in time, in closed form."""
    bounds = [*range(0, tokens, CHUNK_TOKENS), tokens]
    spans = list(itertools.pairwise(bounds))
    bits = [8 * max(1, round(option.bytes_per_token * (stop - start))) for start, stop in spans]
    if option.name == RECOMPUTE:
        compute_s = [basis.forward_s(start, stop) for start, stop in spans]
    else:
        compute_s = [option.decode_s_per_token * (stop - start) for start, stop in spans]
    prefill_s = basis.forward_s(tokens, tokens + basis.prompt_tokens) if basis.prompt_tokens else 0.0

    def at(rate_bps: float) -> float:
        arrived_s = computed_s = 2 * RTT_S  # the manifest, then the first chunk
        for chunk_bits, chunk_s in zip(bits, compute_s, strict=True):
            arrived_s += chunk_bits / rate_bps
            computed_s = max(arrived_s, computed_s) + chunk_s
        return computed_s + prefill_s

    return at


def first_faster(one: Callable[[float], float], other: Callable[[float], float]) -> float | None:
    """The bandwidth from which on `one` takes less than `other`: 0 if it always does, None if it never does."""
    faster = [one(rate) < other(rate) for rate in RATES_BPS]
    if not faster[-1]:
        return None
    if all(faster):
        return 0.0
    at = len(faster) - 1 - faster[::-1].index(False)
    return _halved(one, other, RATES_BPS[at], RATES_BPS[at + 1])


def last_faster(one: Callable[[float], float], other: Callable[[float], float]) -> float | None:
    """The bandwidth up to which `one` takes less than `other`: infinite if it always does, None if it never does."""
    faster = [one(rate) < other(rate) for rate in RATES_BPS]
    if not faster[0]:
        return None
    if all(faster):
        return math.inf
    at = faster.index(False)
    return _halved(one, other, RATES_BPS[at - 1], RATES_BPS[at])


def _halved(one: Callable[[float], float], other: Callable[[float], float], low: float, high: float) -> float:
    """Where the order of two changes between two rates."""
    before = one(low) < other(low)
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if (one(middle) < other(middle)) == before else (low, middle)
    return math.sqrt(low * high)


def text(advice: dict[str, Any]) -> str:
    """The advice as a table and sentences."""
    rows = advice["options"]
    raw = next(row for row in rows if row["name"] == RAW)
    where = f"{advice['model']}, {advice['tokens']} tokens, {format_rate(advice['bandwidth_bps'])}"
    lines = [
        f"{where}; compute: {advice['compute']}",
        f"{'':<22} {'size':>9} {'KL (nats)':>10} {'TTFT':>9} {'vs raw':>7}   "
        f"{'faster than raw':<17} faster than recomputing",
    ]
    for row in rows:
        ratio = "" if row is raw else f"{raw['ttft_s'] / row['ttft_s']:.3g}x"
        lines.append(
            f"{_label(row):<22} {words.bytes_words(row['bytes']):>9} {words.nats(row['distortion']):>10} "
            f"{format_time(row['ttft_s']):>9} {ratio:>7}   "
            f"{'' if row is raw else _below(row['faster_than_raw_below_bps']):<17} "
            f"{'' if row['name'] == RECOMPUTE else _above(row['faster_than_recompute_above_bps'])}".rstrip()
        )
    best = min(rows, key=lambda row: float(row["ttft_s"]))
    lines.append(f"fastest here: {_label(best)}, {format_time(best['ttft_s'])} to the first token")
    return "\n".join([*lines, f"from: {advice['about']}"])


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['level']})"


def _below(rate_bps: float | None) -> str:
    if rate_bps is None:
        return "never"
    return "always" if math.isinf(rate_bps) else f"below {format_rate(rate_bps)}"


def _above(rate_bps: float | None) -> str:
    if rate_bps is None:
        return "never"
    return "always" if rate_bps == 0.0 else f"above {format_rate(rate_bps)}"
