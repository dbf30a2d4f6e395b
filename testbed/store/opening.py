"""A store by its path or URL."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from kvstream.testbed.errors import MachineError, SpecError, install
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.store import Store

URL: Final = re.compile(r"[a-z][a-z0-9+.:-]*://")
S3: Final[dict[str, Any]] = {
    # an address where nothing listens is told within seconds; the SDK's own limits are a minute and five tries
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"mode": "standard", "max_attempts": 3},
        "max_pool_connections": 32,
    }
}
_SDKS: Final = ("botocore", "aiobotocore", "s3fs", "fsspec")


def open_store(where: str | Path, *, create: bool = True, quota_bytes: int | None = None) -> ContextStore:
    """The store in a folder (a path, `file://`), or at a URL that fsspec knows: `s3://bucket/prefix`, `memory://x`.

    `create=False` refuses one that does not exist. Contexts are kept under `quota_bytes` whenever one is put.
    Raises SpecError for a URL that cannot be meant or a bucket that is missing; MachineError without the package for
    it, without credentials, and for an address that does not answer.
    """
    text = str(where)
    if isinstance(where, Path) or not URL.match(text):
        return Store(where, create=create, quota_bytes=quota_bytes)
    if text.startswith(("file://", "local://")):
        return Store(unquote(urlsplit(text).path), create=create, quota_bytes=quota_bytes)
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise _missing(text, error) from error
    from kvstream.testbed.store.bucket import Bucket

    for name in _SDKS:  # their lines say what our errors say, more than once
        logging.getLogger(name).setLevel(logging.ERROR)
    scheme = text.partition("://")[0]
    settings = dict(S3) if scheme in ("s3", "s3a") else {}
    if settings:  # fsspec keeps file systems by their settings, and must not go on with an address that was changed
        settings["endpoint_url"] = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    try:
        # listings of a store that others write must be asked for
        fs, root = fsspec.url_to_fs(text, use_listings_cache=False, **settings)
    except ImportError as error:
        raise _missing(text, error) from error
    except ValueError as error:
        known = "a folder, s3://bucket/prefix, or another URL that fsspec knows"
        raise SpecError(f"{text}: {str(error).splitlines()[0][:150]}; give {known}") from error
    if not root.strip("/"):
        raise SpecError(f"{text}: give a bucket, as in s3://bucket/prefix")
    return Bucket(text, fs, root, create=create, quota_bytes=quota_bytes)


def _missing(url: str, error: ImportError) -> MachineError:
    scheme = url.partition("://")[0]
    if scheme in ("s3", "s3a") or error.name == "fsspec":
        return MachineError(f"{scheme}:// needs package {error.name or 's3fs'}; run: {install('s3fs')}")
    return MachineError(f"{scheme}:// needs a package: {str(error).splitlines()[0][:150]}")
