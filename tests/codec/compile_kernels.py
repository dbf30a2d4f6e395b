"""Compile every Triton kernel for an H100 or H200, without one; print a line for each: name, registers, spilled bytes.

Run as a program: the kernels must not have been imported under Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvstream.codec.entropy import arithmetic_triton, device, rans_triton

POINTERS = {
    "payload": "*i32", "offsets": "*i32", "rows": "*i32", "slots": "*u8", "entries": "*i64", "cdf": "*i32",
    "damaged": "*i32", "values": "*fp32", "scale": "*fp32", "offset": "*fp32", "token_scale": "*fp32", "out": "*fp16",
    "symbols": "*u8", "scratch": "*i32", "lengths": "*i32", "groups": "*i32", "deltas": "*i32", "units": "*i16",
}  # fmt: skip
DECODE = {"SCALED": True, "N_SYMBOLS": 32, "BLOCK": 32}
KERNELS: list[tuple[str, Any, dict[str, Any], dict[str, str]]] = [
    (
        "rans decode, symbols",
        rans_triton._decode,
        {"KIND": 0, **DECODE, "SCALED": False},
        {"out": "*u8", "units": "i32"},
    ),
    ("rans decode, linear", rans_triton._decode, {"KIND": 1, **DECODE}, {"units": "i32"}),
    ("rans decode, lookup", rans_triton._decode, {"KIND": 2, **DECODE}, {"units": "i32"}),
    ("rans encode", rans_triton._encode, {"N_SYMBOLS": 32, "BLOCK": 32}, {"scratch": "*i16"}),
    ("arithmetic decode, linear", arithmetic_triton._decode, {"KIND": 1, **DECODE, "STEPS": 5}, {"units": "i32"}),
    ("arithmetic decode, lookup", arithmetic_triton._decode, {"KIND": 2, **DECODE, "STEPS": 5}, {"units": "i32"}),
    ("arithmetic encode", arithmetic_triton._encode, {"N_SYMBOLS": 32, "BLOCK": 32}, {}),
    ("compact", device._compact, {"FROM_END": True, "BLOCK": 128}, {"scratch": "*i16", "offsets": "*i64"}),
]


def main() -> None:
    for name, kernel, constants, types in KERNELS:
        known = {**POINTERS, **types}
        signature = {a: "constexpr" if a in constants else known.get(a, "i32") for a in kernel.arg_names}
        constexprs = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constexprs),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 1, "enable_fp_fusion": False},
        )
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            )
        registers, local = re.findall(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage.stdout)[0]
        print(f"{name}: registers {registers}, spilled {local}")


if __name__ == "__main__":
    main()
