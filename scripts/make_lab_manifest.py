"""Make the lab's situation from a run: a real context's sizes and distortions, and the compute times measured in it.

    python scripts/make_lab_manifest.py runs/main [--context docs] [--codec cachegen] [--chunks 10]

`--chunks` keeps the first so many chunks (a prefix of a context is a context), so that a middle level takes about the
lab's deadline at 30 Mbit/s. The lab itself reads only the file written here and needs neither torch nor a store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from testbed.lab.situation import FILE
from testbed.machine import cache_dir
from testbed.results import Run
from testbed.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--context", default="docs")
    parser.add_argument("--codec", default="cachegen")
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()

    costs = Run.open(args.run).manifest["costs"]
    identifier = next(key for key in costs if key.startswith(f"{args.context}-{args.codec}-"))
    found = next((cache_dir() / "stores").glob(f"*/contexts/{identifier}/manifest.json"))
    whole = Store(found.parents[2], create=False).manifest(identifier)
    manifest = replace(whole, chunks=whole.chunks[: args.chunks])
    measured = costs[identifier]
    # a level's decode time is the same for every chunk: one that the machine disturbed must not stand out
    decode_s = [statistics.median(column) for column in zip(*measured["decode_s"], strict=True)]
    result = {
        "manifest": manifest.to_json(),
        "costs": {
            "decode_s": [[round(value, 4) for value in decode_s]] * len(manifest.chunks),
            "recompute_s": [round(value, 4) for value in measured["recompute_s"][: args.chunks]],
            "prefill_s": round(measured["prefill_s"], 4),
        },
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(manifest.chunks)} chunks, {len(manifest.levels)} levels")
    for level, info in enumerate(manifest.levels):
        total = sum(chunk.sizes_bytes[level] for chunk in manifest.chunks)
        print(
            f"  {level} {info.name}: {info.bits_per_element:.2f} bit, {total / 1e6:.2f} MB, "
            f"{info.distortion:.5f} nats, decode {1000 * decode_s[level]:.1f} ms a chunk"
        )
    print(f"  text: recompute {1000 * statistics.mean(result['costs']['recompute_s']):.0f} ms a chunk")


if __name__ == "__main__":
    main()
