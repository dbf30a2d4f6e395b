"""Draw `testbed/workloads/data/requests/chats.jsonl`, the request trace that comes with kvstream.

    python scripts/make_requests.py

Chats in Mooncake's format: a system prompt that many share, then a document, then turns that repeat all that came
before. Everything is drawn from a fixed seed; no one's text or traffic is in it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS, SAMPLE  # noqa: E402

REQUESTS, SEED, CHATS_PER_S = 600, 1, 0.5
SYSTEM_PROMPTS = (512, 1024, 1024, 2048, 2560, 4096)
"""Tokens; the first ones are the most common."""
MAX_PROMPT = 32_000


def draw() -> list[dict[str, object]]:
    rng, ids, rows, now_s = random.Random(SEED), 0, [], 0.0
    systems = []
    for tokens in SYSTEM_PROMPTS:
        systems.append(list(range(ids, ids + tokens // BLOCK_TOKENS)))
        ids += tokens // BLOCK_TOKENS
    while len(rows) < 3 * REQUESTS:  # of all chats; the first REQUESTS in time are kept
        now_s += rng.expovariate(CHATS_PER_S)
        blocks = list(rng.choices(systems, [1.0 / (rank + 1) for rank in range(len(systems))])[0])
        length = len(blocks) * BLOCK_TOKENS + int(rng.lognormvariate(7.6, 1.0))
        at_s = now_s
        while length <= MAX_PROMPT:
            full = length // BLOCK_TOKENS
            blocks += range(ids, ids + full - len(blocks))
            ids += full + 1  # above all that are taken
            output = max(1, int(rng.lognormvariate(5.3, 0.8)))
            partial = [ids - 1] if length % BLOCK_TOKENS else []
            rows.append((at_s, length, output, [*blocks, *partial]))
            if rng.random() < 0.25:
                break
            length += output + int(rng.lognormvariate(4.5, 1.0))
            at_s += output / 40.0 + rng.expovariate(1 / 20.0)
    rows.sort(key=lambda row: row[0])
    dense: dict[int, int] = {}
    return [
        {
            "timestamp": round(1e3 * at_s),
            "input_length": length,
            "output_length": output,
            "hash_ids": [dense.setdefault(block, len(dense)) for block in mine],
        }
        for at_s, length, output, mine in rows[:REQUESTS]
    ]


def text() -> str:
    return "".join(json.dumps(row) + "\n" for row in draw())


if __name__ == "__main__":
    SAMPLE.parent.mkdir(parents=True, exist_ok=True)
    SAMPLE.write_text(text())
