"""The observation of a policy in Python, from the arrays of `_requests_loop`: as `Session.observe`."""

from __future__ import annotations

from typing import Any

from kvstream.policies.api import TEXT, Computed, InFlight, LevelOrText, Observation, Transfer


def observe(
    state: tuple[Any, ...],
    tables: tuple[Any, ...],
    ladder: tuple[float, ...],
    s: int,
    now_s: float,
    deadline_s: float,
    rtt_s: float,
) -> Observation:
    """What the request in slot `s` may know at `now_s`; `ladder` is the distortion of each level."""
    from kvstream.testbed.simulator import _requests_loop as loop

    slots, all_chunks, all_transfers, _, _, _, engines = state[:7]
    one, chunks = slots[s], all_chunks[s]
    size, text_bytes, decode_s, recompute_s, _, tokens = (table[s] for table in tables)
    n = int(one["chunks"])
    states = chunks["state"][:n].tolist()
    remaining = [k for k in range(n) if states[k] == loop.IDLE]
    rows = all_transfers[s][: int(one["arrived"])].tolist()
    done = sorted((row["end_s"], k, row) for k, row in enumerate(chunks[:n]) if states[k] == loop.DONE)
    return Observation(
        chunk=remaining[0],
        n_chunks=n,
        now_s=now_s - float(one["arrival_s"]),
        deadline_s=deadline_s,
        remaining=tuple(remaining),
        tokens=tuple(tokens[remaining].tolist()),
        sizes_bytes=tuple(map(tuple, size[remaining].tolist())),
        distortion=(ladder,) * len(remaining),
        text_bytes=tuple(text_bytes[remaining].tolist()),
        recompute_s=tuple(recompute_s[remaining].tolist()),
        decode_s=tuple(map(tuple, decode_s[remaining].tolist())),
        prefill_s=float(one["prefill_s"]),
        transfers=tuple(Transfer(row[0], _level(row[1]), *row[2:]) for row in rows),
        in_flight=tuple(_flight(one, chunks, int(one[name])) for name in ("flow", "next") if one[name] >= 0),
        compute_backlog_s=float(loop.backlog_of(state, tables, s, now_s)),
        computed=tuple(Computed(k, _level(row["level"]), float(row["start_s"]), float(end)) for end, k, row in done),
        rtt_s=rtt_s,
        concurrent=int(engines[int(one["engine"])]["serving"]),
        seed=int(one["request"]),
    )


def _flight(one: Any, chunks: Any, k: int) -> InFlight:
    chunk = chunks[k]
    is_first = k == one["flow"] and bool(one["seen"])
    return InFlight(
        chunk=k,
        level=_level(chunk["level"]),
        bytes=int(chunk["bytes"]),
        received_bytes=int(chunk["received"]),
        since_s=float(chunk["request_s"]),
        first_byte_s=float(chunk["first_s"]) if is_first else None,
        burst_bytes=int(one["burst_bytes"]) if is_first else 0,
        burst_end_s=float(one["burst_end_s"]) if is_first else 0.0,
    )


def _level(number: int) -> LevelOrText:
    return TEXT if number < 0 else int(number)
