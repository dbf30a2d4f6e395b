"""Make the lab's situation from a real context: the bundled model's cache, encoded, with compute times of this machine.

    python scripts/make_lab_manifest.py [--context docs] [--codec cachegen] [--output testbed/lab/manifest.json]

The lab itself needs neither torch nor the store: it reads only the file written here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from testbed.compute import Compute, measure_costs
from testbed.lab.situation import FILE
from testbed.llm import Model
from testbed.prepare import find_contexts, prepare
from testbed.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="docs")
    parser.add_argument("--codec", default="cachegen")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()

    prepared = prepare("bundled", [args.context], [args.codec], args.chunk_tokens, print)
    identifier = prepared.ids[args.context, args.codec]
    store = Store(prepared.path, create=False)
    manifest = store.manifest(identifier)
    compute = Compute(Model.load(prepared.model))
    if manifest.profile is not None:
        compute.add_profile(store.profile(manifest.profile))
    [context] = find_contexts([args.context])
    prompt = compute.model.encode(context.questions[0].prompt.decode())
    compute.reserve(manifest.tokens + len(prompt) + 1)
    costs = measure_costs(compute, manifest, lambda chunk, level: store.get_kv(f"{identifier}/{chunk}", level), prompt)
    compute.close()
    result = {
        "manifest": manifest.to_json(),
        "costs": {
            "decode_s": [[round(value, 5) for value in row] for row in costs.decode_s],
            "recompute_s": [round(value, 5) for value in costs.recompute_s or ()],
            "prefill_s": round(costs.prefill_s, 5),
        },
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(manifest.chunks)} chunks, {len(manifest.levels)} levels")
    for level, info in enumerate(manifest.levels):
        total = sum(chunk.sizes_bytes[level] for chunk in manifest.chunks)
        decode_ms = 1000 * statistics.mean(row[level] for row in costs.decode_s)
        print(
            f"  {level} {info.name}: {info.bits_per_element:.2f} bit, {total / 1e6:.2f} MB, "
            f"{info.distortion:.5f} nats, decode {decode_ms:.1f} ms a chunk"
        )
    print(f"  text: recompute {statistics.mean(costs.recompute_s or (0,)) * 1000:.0f} ms a chunk")


if __name__ == "__main__":
    main()
