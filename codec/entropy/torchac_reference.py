"""torchac, the arithmetic coder of CacheGen's public code, behind the same functions as
`kvstream.codec.entropy.arithmetic`.

A reference for tests and benchmarks. torchac is GPL-3.0 and is imported only when a function here is called; the first
import compiles its C++ (about 20 s, needs ninja and a C++ compiler). It holds the GIL and needs a CDF row per symbol.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy.arithmetic import Cdfs
from kvstream.codec.errors import CodecError


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
    """Symbols uint8 `[C, T]` of one stream per column. Damage is not detected."""
    torchac, torch = _torchac()
    out = np.empty((len(streams), tokens), np.uint8)
    for c, (stream, k) in enumerate(zip(streams, table_of_column, strict=True)):
        rows = torch.from_numpy(_contiguous_rows(cdfs, int(k), tokens))
        out[c] = torchac.decode_int16_normalized_cdf(rows, stream).numpy()
    return out


def _contiguous_rows(cdfs: Cdfs, k: int, tokens: int) -> NDArray[np.int16]:
    """The CDF once per symbol, in its own memory: torchac silently reads an expanded view out of bounds."""
    return np.tile(cdfs.cumulative[k].view(np.int16), (tokens, 1))


@cache
def _torchac() -> tuple[Any, Any]:
    # Its C++ extension is built by ninja, which pip installs next to the interpreter, not necessarily on PATH.
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    try:
        with _stdout_to_stderr():
            import torch

            await_build()
            import torchac
    except (ImportError, OSError, RuntimeError) as error:
        raise CodecError(
            f"torchac is not usable ({error}); pip install torchac ninja, and have a C++ compiler"
        ) from error
    return torchac, torch


def await_build() -> None:
    """Wait while another process builds torchac's C++, and remove the lock of one that was killed: torch waits for as
    long as the file is there, whoever left it."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in Path(root).rglob("torchac_backend/lock"):
        closed = 0
        while lock.exists() and closed < 3:  # a build that ends closes its lock a moment before it removes it
            time.sleep(0.1)
            closed = 0 if _is_open(lock) else closed + 1
        lock.unlink(missing_ok=True)


def _is_open(file: Path) -> bool:
    """Whether some process of this user has a file open; other users have caches of their own."""
    name = str(file.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has been closed, or is another user's
            if os.readlink(descriptor) == name:
                return True
    return False


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """torchac's build prints to standard output, where a command may be writing JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
