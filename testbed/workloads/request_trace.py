"""Requests in time: what comes after what, and which beginnings of prompts are the same.

Mooncake's format (FAST 2025; github.com/kvcache-ai/Mooncake, FAST25-release/traces) is a line of JSON per request:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, ...]}

`timestamp` is its arrival in ms, lengths are tokens, and `hash_ids` names the prompt's blocks of 512 tokens (the last
may be shorter), each with all that comes before it: equal ids are equal prefixes, whose KV cache can be reused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed import files
from kvstream.testbed.errors import SpecError
from kvstream.testbed.workloads.synthetic import MAX_TOKENS

BLOCK_TOKENS: Final = 512
SAMPLE: Final = Path(__file__).parent / "data" / "requests" / "chats.jsonl"
"""Ours: `scripts/make_requests.py` draws it."""
MAX_REQUESTS: Final = 1_000_000
MAX_BLOCKS: Final = 50_000_000
"""Of all requests together."""
MAX_LINE: Final = 1 << 16
"""Characters of a line: the ids of a prompt of MAX_TOKENS have fewer."""
MAX_MS: Final = 1e12


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """Requests in the order of their arrivals. Arrays run over requests."""

    name: str
    arrivals_s: NDArray[np.float64]
    """Never falling, from 0 on."""
    tokens: NDArray[np.int64]
    """Of the prompt."""
    output_tokens: NDArray[np.int64]
    firsts: NDArray[np.int64]
    """[requests + 1]: where a request's blocks begin in `blocks`."""
    blocks: NDArray[np.int64]
    """Ids of the blocks of all requests, one request after the other; 0 to `n_blocks`."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def n_blocks(self) -> int:
        """Ids that there are."""
        return int(self.blocks.max(initial=-1)) + 1

    @cached_property
    def rate(self) -> float:
        """Requests per second; 0 where all come at once."""
        span_s = float(self.arrivals_s[-1])
        return (len(self) - 1) / span_s if span_s > 0.0 else 0.0

    @cached_property
    def reusable(self) -> float:
        """Share of the tokens that an unbounded cache would hold when their request comes, one after the other."""
        seen = np.zeros(self.n_blocks, bool)
        found = 0
        for number in range(len(self)):
            mine = self.blocks[self.firsts[number] : self.firsts[number + 1]]
            held = seen[mine[: (int(self.tokens[number]) - 1) // BLOCK_TOKENS]]
            found += BLOCK_TOKENS * (len(held) if held.all() else int(held.argmin()))
            seen[mine[: int(self.tokens[number]) // BLOCK_TOKENS]] = True
        return found / int(self.tokens.sum())

    def repeated(self, count: int, start: int = 0) -> RequestTrace:
        """So many requests from number `start` on; at its end the trace begins again, with contents that are new each
        time. Raises SpecError for more than memory should take."""
        if count * float(np.diff(self.firsts).mean()) > MAX_BLOCKS:
            raise SpecError(f"{count} requests of {self.name} have more than {MAX_BLOCKS} blocks; take fewer requests")
        passes = -(-(start + count) // len(self))
        period_s = float(self.arrivals_s[-1]) * (1.0 + 1.0 / max(len(self) - 1, 1))
        blocks = np.concatenate([self.blocks + number * self.n_blocks for number in range(passes)])
        firsts = np.concatenate(([0], np.cumsum(np.tile(np.diff(self.firsts), passes))))[start : start + count + 1]
        some = slice(start, start + count)
        times_s = np.concatenate([self.arrivals_s + number * period_s for number in range(passes)])[some]
        return RequestTrace(
            self.name,
            times_s - times_s[0],
            np.tile(self.tokens, passes)[some],
            np.tile(self.output_tokens, passes)[some],
            firsts - firsts[0],
            np.unique(blocks[firsts[0] : firsts[-1]], return_inverse=True)[1].reshape(-1).astype(np.int64),
        )


def of_requests(
    name: str,
    arrivals_s: Sequence[float],
    tokens: Sequence[int],
    output_tokens: Sequence[int],
    blocks: Sequence[Sequence[int]],
) -> RequestTrace:
    """From lists, in any order of arrivals; ids are any integers. Times are moved so that the first is 0."""
    order = np.argsort(np.array(arrivals_s, dtype=float), kind="stable")
    times = np.array(arrivals_s, dtype=float)[order]
    sorted_blocks = [blocks[number] for number in order]
    ids = np.array([block for mine in sorted_blocks for block in mine], dtype=np.int64)
    return RequestTrace(
        name,
        times - times[0],
        np.array(tokens, dtype=np.int64)[order],
        np.array(output_tokens, dtype=np.int64)[order],
        np.concatenate(([0], np.cumsum([len(mine) for mine in sorted_blocks]))).astype(np.int64),
        np.unique(ids, return_inverse=True)[1].reshape(-1).astype(np.int64),
    )


def read(path: str | Path) -> RequestTrace:
    """A trace in Mooncake's format. Raises SpecError that names the line."""
    file = Path(path)
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return parse(_lines(lines, str(path)), file.name, str(path))
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not a request trace, which is JSON lines in UTF-8 ({error.reason})") from None
    except FileNotFoundError:
        raise SpecError(f"{path}: no such request trace; give a file in Mooncake's format, or 'chats'") from None


def _lines(file: Any, what: str) -> Iterable[str]:
    """The lines of a file, none of which takes much memory."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise SpecError(f"{what}: line {number} has more than {MAX_LINE} characters; a request has fewer")
        yield line


def parse(lines: Iterable[str], name: str, what: str) -> RequestTrace:
    """From lines; errors begin with `what`. Empty lines and unknown fields are skipped. Raises SpecError."""
    arrivals_s, tokens, outputs, blocks, n_blocks = [], [], [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{what}: line {number}"
        body = files.parse_json(line, where)
        if not isinstance(body, dict):
            raise SpecError(f"{where}: not an object with timestamp, input_length, output_length and hash_ids")
        length = _count(body, "input_length", 1, where)
        ids = body.get("hash_ids")
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 1 << 63 for one in ids):
            raise SpecError(f"{where}: hash_ids must be a list of whole numbers from 0 to 2^63")
        if len(ids) > -(-length // BLOCK_TOKENS):
            blocks_of = f"{-(-length // BLOCK_TOKENS)} blocks of {BLOCK_TOKENS}"
            raise SpecError(
                f"{where}: {len(ids)} hash_ids for {length} tokens, which have {blocks_of}; is this Mooncake's?"
            )
        arrivals_s.append(_milliseconds(body, where) / 1e3)
        tokens.append(length)
        outputs.append(_count(body, "output_length", 0, where))
        blocks.append(ids)
        n_blocks += len(ids)
        if len(tokens) > MAX_REQUESTS or n_blocks > MAX_BLOCKS:
            raise SpecError(f"{what}: more than {MAX_REQUESTS} requests or {MAX_BLOCKS} blocks; give a part of it")
    if not tokens:
        raise SpecError(f"{what}: no requests in it")
    return of_requests(name, arrivals_s, tokens, outputs, blocks)


def _milliseconds(body: dict[str, Any], where: str) -> float:
    value: Any = body.get("timestamp")
    if type(value) not in (int, float) or not 0 <= value <= MAX_MS:
        raise SpecError(f"{where}: timestamp is {_shown(value)}; give milliseconds from 0 to {MAX_MS:g}")
    return float(value)


def _count(body: dict[str, Any], key: str, least: int, where: str) -> int:
    value = body.get(key)
    if type(value) is not int or not least <= value <= MAX_TOKENS:
        raise SpecError(f"{where}: {key} is {_shown(value)}; give a whole number from {least} to {MAX_TOKENS}")
    return value


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    return f"{value:g}" if isinstance(value, float) else str(value)[:40] if isinstance(value, int) and abs(
        value
    ) < 10**30 else type(value).__name__  # fmt: skip
