"""Run folders for tests of what reads them: a fluid link, 16 chunks, seven rules, no simulator and no emulator."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvstream.testbed.results.folder import Row, Run
from kvstream.testbed.session.record import ChunkRecord

DISTORTION = (0.021, 0.0084, 0.0031, 0.0011)
BITS = (1.1, 1.7, 2.4, 3.4)
N_CHUNKS = 16
CHUNK_BYTES = tuple(256 * 2560 * bits / 8 for bits in BITS)
TEXT_BYTES = 512
RECOMPUTE_S = 0.21
DECODE_S = 0.012
DEADLINE_S = 1.0
TRACES = {
    "steady,scale_mean=30Mbps": lambda t_s: 30e6,
    "step-down-up,scale_mean=30Mbps": lambda t_s: 12e6 if 0.3 <= t_s < 0.7 else 42e6,
    "uniform,low=5Mbps,high=55Mbps,hold=0.2s,seed=7": lambda t_s: random.Random(int(t_s / 0.2)).uniform(5e6, 55e6),
    "lte-walk,scale_mean=30Mbps": lambda t_s: 30e6 + 12e6 * math.sin(5 * t_s),
}
Rule = Callable[[int, float, float], "int | str"]
"""Level from (chunks left, seconds left, last rate in bit/s)."""


def _fits(left: int, left_s: float, rate_bps: float) -> int:
    levels = [level for level, size in enumerate(CHUNK_BYTES) if left * size * 8 / max(rate_bps, 1) <= left_s - 0.05]
    return max(levels, default=0)


RULES: dict[str, Rule] = {
    "cachegen": _fits,
    "cachegen-depth1": lambda left, left_s, rate_bps: _fits(left, left_s - 0.08, rate_bps),
    "buffer-based": lambda left, left_s, rate_bps: min(3, max(0, int((left_s - left * 0.04) / 0.12))),
    "oracle": lambda left, left_s, rate_bps: min(3, max(0, int((left_s - left * 0.036) / 0.08))),
    "fixed-lowest": lambda left, left_s, rate_bps: 0,
    "fixed-highest": lambda left, left_s, rate_bps: 3,
    "text": lambda left, left_s, rate_bps: "text",
}


def make_run(folder: Path, contexts: tuple[str, ...] = ("docs", "code", "prose"), spoil: bool = True) -> Run:
    """A finished run in `folder`: every rule on contexts x traces. `spoil` makes one session invalid, one failed."""
    run = Run(folder)
    run.create(manifest())
    index = 0
    for trace, rate in TRACES.items():
        for context in contexts:
            for scheme, rule in RULES.items():
                row, chunks, link = session(
                    f"{index:03d}-{context}-0000{index:04x}", scheme, context, trace, rate, rule
                )
                if spoil and index == 4 and scheme == "text":
                    row.update(status="failed", why="the sender closed the stream", ttft_s=None, met=False)
                    row.update(distortion=None, measured_kl=None, regret=None, bytes=None, levels=[])
                if spoil and index == 7 and scheme == "buffer-based":
                    row.update(status="invalid", why="p95 error 31 % over 5 %", met=False, regret=None)
                    row["fidelity"] |= {"ok": False, "p95_error": 0.31, "reasons": ["p95 error 31 % over 5 %"]}
                run.save(Row(**row), chunks, link)
            index += 1
    run.rebuild()
    return run


def session(
    unit_id: str, scheme: str, context: str, trace: str, rate: Callable[[float], float], rule: Rule
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """One session as the cell holds it: row, chunks, link samples. Chunks queue on the link and on one decoder."""
    now_s, last_bps, free_s, chunks = 0.02, 20e6, 0.0, []
    ends = []
    for i in range(N_CHUNKS):
        level = rule(N_CHUNKS - i, DEADLINE_S - now_s, last_bps)
        size = TEXT_BYTES if level == "text" else int(CHUNK_BYTES[int(level)] * (1 + 0.04 * math.sin(3 * i)))
        end_s = _arrival(rate, now_s + 0.004, size * 8 / 0.956)
        last_bps = size * 8 / (end_s - now_s)
        start_s = max(free_s, end_s)
        free_s = start_s + (RECOMPUTE_S if level == "text" else DECODE_S)
        chunks.append(
            ChunkRecord(
                i, level, size, now_s, now_s + 0.004, end_s, start_s, free_s, {"estimate_bps": last_bps}, None, 1, size
            )
        )
        ends.append((now_s, end_s, size))
        now_s = end_s
    ttft_s = free_s + 0.03
    levels = [chunk.level for chunk in chunks]
    distortion = sum(DISTORTION[level] for level in levels if isinstance(level, int)) / N_CHUNKS
    oracle = [2] * 10 + [1] * 6
    oracle_distortion = sum(DISTORTION[level] for level in oracle) / N_CHUNKS
    met = ttft_s <= DEADLINE_S
    link = []
    for k in range(int(ttft_s * 100) + 1):
        t_s = k / 100
        delivered = sum(size * min(1, max(0, (t_s - a) / (b - a))) for a, b, size in ends) / 0.956
        link.append(
            {
                "t_s": t_s,
                "capacity_bps": rate(t_s),
                "delivered_bytes": int(delivered),
                "backlog_bytes": 20_000,
                "drops": 0,
                "lateness_s": 0.0002,
            }
        )
    row = {
        "unit_id": unit_id,
        "scheme": scheme,
        "policy": {"fixed-lowest": "fixed,level=lowest", "fixed-highest": "fixed,level=highest"}.get(
            scheme, scheme.removesuffix("-depth1")
        ),
        "codec": "cachegen",
        "clairvoyant": scheme == "oracle",
        "model": "9f1c2ab0",
        "backend": "mininet",
        "context": context,
        "trace": trace,
        "offset_s": 0.0,
        "link": "queue=50ms",
        "seed": 1,
        "depth": 1 if scheme.endswith("depth1") else 2,
        "overlap": True,
        "status": "ok",
        "why": "",
        "deadline_s": DEADLINE_S,
        "ttft_s": ttft_s,
        "met": met,
        "distortion": distortion,
        "measured_kl": distortion * 1.2,
        "answer_ok": True,
        "answers_right": 12 if distortion < 0.01 else 11,
        "answers": 12,
        "levels": levels,
        "bytes": sum(chunk.bytes for chunk in chunks),
        "wasted_bytes": 0,
        "policy_faults": 0,
        "oracle_distortion": oracle_distortion,
        "oracle_levels": oracle,
        "regret": max(0.0, distortion - oracle_distortion) if met else None,
        "fidelity": {"ok": True, "reasons": [], "median_error": 0.004, "p95_error": 0.012, "lateness_p99_s": 0.0004},
        "repeats": 0,
    }
    return row, [asdict(chunk) for chunk in chunks], link


def manifest() -> dict[str, Any]:
    return {
        "experiment": {
            "name": "made",
            "contexts": ["docs", "code", "prose"],
            "traces": list(TRACES),
            "deadlines_s": [DEADLINE_S],
            "baseline": "fixed-highest",
            "seed": 1,
        },
        "backend": "mininet",
        "git": "0123456789ab",
        "processor": "a processor",
        "cores": 2,
        "model": {"name": "made", "source": "made", "fingerprint": "f1" * 32},
        "traces": dict.fromkeys(TRACES, "ab" * 32),
        "profiles": {"cachegen": "cd" * 32},
        "networks": {
            "": {"link": {"queue_s": 0.05, "cc": "cubic"}, "shaper": {"qdisc": "htb"}},
            "delay=20ms": {"link": {"delay_s": 0.02}, "impairments": {"backend": "nfqueue"}, "shaper": {}},
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "kernel": "6.1.0-test",
        "levels": {
            "cachegen": [
                {"name": f"level {i}", "distortion": d, "bits_per_element": b}
                for i, (d, b) in enumerate(zip(DISTORTION, BITS, strict=True))
            ]
        },
        "command": "kvstream run",
        "schemes": [{"name": name} for name in RULES],
        "units": [],
    }


def _arrival(rate: Callable[[float], float], start_s: float, bits: float) -> float:
    """When `bits` have passed a link of `rate`, by steps of 1 ms."""
    t_s = start_s
    while bits > 0:
        bits -= rate(t_s) * 0.001
        t_s += 0.001
    return t_s + bits / rate(t_s)
