"""LMCache's own StorageManager with our serde and adapter, in the environment of `scripts/engines.sh lmcache`.

    {"kv": FILE, "folder": DIR, "adapter": {...}, "damage": null | "bit" | "swap", "patience_s": 60}

For the tensors `[2, L, T, H * D]` of a safetensors file: stores each as an object, ends, does the damage, and loads
them again with a new manager, into `found.safetensors` in the folder. Answers the names found and the sizes of the
files. `import` names a module to import before.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(round_trip(json.loads(line))), file=answers, flush=True)


def round_trip(command: dict[str, Any]) -> dict[str, Any]:
    from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
    from safetensors.torch import load_file, save_file

    if "import" in command:
        importlib.import_module(command["import"])
    tensors = load_file(command["kv"])
    folder = Path(command["folder"])
    keys = {name: ObjectKey(name.encode() * 8, "tiny-kv", 0x01000100) for name in sorted(tensors)}
    first = next(iter(tensors.values()))
    layout = MemoryLayoutDesc([first.shape], [first.dtype])

    manager = make_manager(command)
    try:
        reserved = manager.reserve_write(list(keys.values()), layout)
        for name, key in keys.items():
            reserved[key].tensor.copy_(tensors[name])
        manager.finish_write(list(keys.values()))
        wait(lambda: len(list(folder.glob("*.data"))) == len(keys), command["patience_s"])
    finally:
        manager.close()
    files = sorted(folder.glob("*.data"))
    sizes = [file.stat().st_size for file in files]
    if command["damage"] == "bit":
        data = bytearray(files[0].read_bytes())
        data[len(data) // 2] ^= 1
        files[0].write_bytes(data)
    elif command["damage"] == "swap":
        one, other = files[0].read_bytes(), files[1].read_bytes()
        files[0].write_bytes(other)
        files[1].write_bytes(one)

    manager = make_manager(command)
    found = {}
    try:
        for name, key in keys.items():
            spec = PrefetchTaskSpec([GroupedObjectKeys([key], 0, layout)])
            handle = manager.submit_prefetch_task(spec)
            manager.wait_prefetch_status(handle, 60.0)
            result = manager.query_prefetch_status(handle)
            if result is not None and result.hit_cells[0].popcount():
                with manager.read_prefetched_results([key]) as objects:
                    found[name] = objects[0].tensor.clone()
                manager.finish_read_prefetched([key])
    finally:
        manager.close()
    if found:
        save_file(found, folder / "found.safetensors")
    return {"found": sorted(found), "sizes": sizes}


def make_manager(command: dict[str, Any]) -> Any:
    """As LMCache's own command line makes one."""
    import argparse

    from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
    from lmcache.v1.distributed.storage_manager import StorageManager

    options = ["--l1-size-gb", "0.25", "--eviction-policy", "LRU", "--no-l1-use-lazy"]
    parser = add_storage_manager_args(argparse.ArgumentParser())
    adapter = json.dumps(command["adapter"])
    return StorageManager(parse_args_to_config(parser.parse_args([*options, "--l2-adapter", adapter])))


def wait(condition: Any, limit_s: float) -> Any:
    end_s = time.monotonic() + limit_s
    while (value := condition()) in (None, False):
        if time.monotonic() > end_s:
            return None
        time.sleep(0.01)
    return value


if __name__ == "__main__":
    main()
