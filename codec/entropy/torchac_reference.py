"""torchac, the arithmetic coder of CacheGen's public code, behind the same functions as `codec.entropy.arithmetic`.

A reference for tests and benchmarks. torchac is GPL-3.0 and is imported only when a function here is called; the first
import compiles its C++ (about 20 s, needs ninja and a C++ compiler). It holds the GIL and needs a CDF row a symbol.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.entropy.arithmetic import Cdfs
from codec.errors import CodecError


def encode_streams(symbols: NDArray[np.uint8], table_of_column: NDArray[Any], cdfs: Cdfs) -> list[bytes]:
    """One byte string for each column of symbols uint8 `[C, T]`."""
    torchac, torch = _torchac()
    tokens = symbols.shape[1]
    streams = []
    for column, k in zip(symbols, table_of_column, strict=True):
        if column.size and int(column.max()) >= cdfs.symbols:
            raise CodecError(f"symbol {int(column.max())} is outside an alphabet of {cdfs.symbols}")
        rows = torch.from_numpy(_contiguous_rows(cdfs, int(k), tokens))
        streams.append(torchac.encode_int16_normalized_cdf(rows, torch.from_numpy(column.astype(np.int16))))
    return streams


def decode_streams(streams: list[bytes], table_of_column: NDArray[Any], cdfs: Cdfs, tokens: int) -> NDArray[np.uint8]:
    """Symbols uint8 `[C, T]` of one stream a column. Nothing in a damaged stream is noticed."""
    torchac, torch = _torchac()
    out = np.empty((len(streams), tokens), np.uint8)
    for c, (stream, k) in enumerate(zip(streams, table_of_column, strict=True)):
        rows = torch.from_numpy(_contiguous_rows(cdfs, int(k), tokens))
        out[c] = torchac.decode_int16_normalized_cdf(rows, stream).numpy()
    return out


def _contiguous_rows(cdfs: Cdfs, k: int, tokens: int) -> NDArray[np.int16]:
    """The CDF once a symbol, in memory of its own: torchac reads an expanded view out of bounds without a word."""
    return np.tile(cdfs.cumulative[k].view(np.int16), (tokens, 1))


@cache
def _torchac() -> tuple[Any, Any]:
    # Its C++ extension is built by ninja, which pip puts beside the interpreter, not necessarily on PATH.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    try:
        with _stdout_to_stderr():
            import torch
            import torchac
    except (ImportError, OSError, RuntimeError) as error:
        raise CodecError(
            f"torchac is not usable ({error}); pip install torchac ninja, and have a C++ compiler"
        ) from error
    return torchac, torch


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """torchac's build talks on the process's standard output, where a command may be writing JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
