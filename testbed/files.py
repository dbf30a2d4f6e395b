"""Files of users and of our own: read without surprises, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvstream.testbed.errors import SpecError


def parse_json(content: str | bytes, what: str) -> Any:
    """JSON, with or without a byte order mark. Raises SpecError that begins with `what`."""
    try:
        return json.loads(_text(content))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{what}: not JSON ({_short(error)})") from error


def parse_toml(content: str | bytes, what: str) -> dict[str, Any]:
    """TOML, with or without a byte order mark. Raises SpecError that begins with `what`."""
    try:
        return tomllib.loads(_text(content))
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits are a ValueError, not a TOMLDecodeError
        raise SpecError(f"{what}: cannot be read as TOML: {_short(error)}") from error


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file so that a reader sees it completely or not at all.

    Without `durable` a power failure may leave a short file. Raises OSError with the path, on a full disk too, and
    leaves no part then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)
                if durable:
                    os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _text(content: str | bytes) -> str:
    return (content.decode() if isinstance(content, bytes) else content).removeprefix("\ufeff")


def _short(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]


def _umask() -> int:
    # it can only be asked by setting it; at import, before there are threads
    value = os.umask(0o022)
    os.umask(value)
    return value


_UMASK = _umask()
