"""A whole cache in one file, for caches that come from elsewhere and for looking at those that arrived.

A safetensors file with `kv` `[L, 2, T, H, D]` (bfloat16, float16 or float32), `token_ids` `[T]` (any integers), and the
metadata `model`: the fingerprint of the model, which receivers compare with their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstream.testbed.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES: Final = ("bfloat16", "float16", "float32")
MAX_TOKEN_ID: Final = (1 << 32) - 1


@dataclass(frozen=True, eq=False)
class KVFile:
    """What such a file holds."""

    kv: Tensor
    token_ids: list[int]
    model: str | None
    """None where the file does not say."""


def read_kv_file(path: Path) -> KVFile:
    """Raises SpecError saying what is wrong with the file."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            missing = {"kv", "token_ids"} - names
            if missing:
                raise SpecError(f"{path} has no tensor {', '.join(sorted(missing))}; it has {', '.join(sorted(names))}")
            kv, ids = file.get_tensor("kv"), file.get_tensor("token_ids")
    except SafetensorError as error:
        raise SpecError(f"{path} is not a safetensors file: {error}") from error
    dtype = str(kv.dtype).removeprefix("torch.")
    if kv.dim() != 5 or kv.shape[1] != 2 or 0 in kv.shape or dtype not in DTYPES:
        raise SpecError(
            f"{path}: kv is {tuple(kv.shape)} of {dtype}, not [layers, 2, tokens, heads, head_dim] of "
            + ", ".join(DTYPES)
        )
    if ids.dim() != 1 or len(ids) != kv.shape[2] or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise SpecError(f"{path}: token_ids is {tuple(ids.shape)} of {ids.dtype}, not {kv.shape[2]} integers")
    token_ids = ids.tolist()
    if min(token_ids) < 0 or max(token_ids) > MAX_TOKEN_ID:
        raise SpecError(f"{path}: token ids from {min(token_ids)} to {max(token_ids)} are outside 0 to {MAX_TOKEN_ID}")
    return KVFile(kv, token_ids, metadata.get("model"))


def write_kv_file(
    path: Path, kv: Tensor, token_ids: Sequence[int], model: str, more: Mapping[str, str] | None = None
) -> None:
    """Write what `read_kv_file` reads; `more` metadata is for people."""
    import torch
    from safetensors.torch import save_file

    tensors = {"kv": kv.contiguous().cpu(), "token_ids": torch.tensor(token_ids, dtype=torch.int64)}
    save_file(tensors, path, metadata={**(more or {}), "model": model})
