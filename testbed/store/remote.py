"""Files under a prefix of an fsspec file system, with errors that say what to do. Calls block, on any thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.errors import MachineError, SpecError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

RANGE_BYTES: Final = 8 << 20
"""A larger object is read in parallel ranges of this size: one connection to S3 carries 50 to 100 MB/s."""
WITHOUT_FOLDERS: Final = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
"""Where folders need not be made, and making one may make a bucket."""
NO_CREDENTIALS: Final = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "CredentialRetrievalError",
    "TokenRetrievalError",
}
UNREACHABLE: Final = {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}
"""Names of botocore's errors: their package need not be there."""


class RemoteError(MachineError, OSError):
    """An object store that cannot be used now; for a server an OSError like any other."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a listing says of a file."""

    size: int
    modified_s: float
    """Seconds since the epoch, by the other side's clock."""
    stamp: str
    """Another one when the file was written again."""


class Remote:
    """Names are relative to the prefix. FileNotFoundError means what it says; other errors are RemoteError."""

    def __init__(self, fs: AbstractFileSystem, url: str, root: str) -> None:
        self.fs = fs
        self.url = url
        self.root = root.rstrip("/")
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self._needs_folders = protocol not in WITHOUT_FOLDERS

    def check_bucket(self) -> None:
        """Raises SpecError where the bucket itself is missing."""
        bucket = self.root.partition("/")[0]
        with self._told():
            if bucket and not self._needs_folders and not self.fs.exists(bucket):
                raise SpecError(f"{self.url}: there is no bucket {bucket!r}; create it, or check the name")

    def files(self, folder: str) -> dict[str, Info]:
        """The files below a folder by their names in it: one request per thousand. Empty where there is none."""
        path = self._path(folder)
        with self._told():
            try:
                found = self.fs.find(path, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(path) + 1 :]: _info(info) for name, info in found.items() if name != path}

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder."""
        with self._told():
            try:
                found = self.fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        return [info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory"]

    def info(self, name: str) -> Info:
        with self._told():
            return _info(self.fs.info(self._path(name)))

    def get(self, name: str, most: int) -> bytes:
        """A whole file, after a look at its size. Raises SpecError for one that has more than `most` bytes."""
        if (size := self.info(name).size) > most:
            raise SpecError(f"{name} has {size} bytes, more than {most}; put it again")
        return self.range(name, 0, size)

    def range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file ends before."""
        starts = list(range(start, stop, RANGE_BYTES))
        stops = [min(at + RANGE_BYTES, stop) for at in starts]
        with self._told():
            pieces = self.fs.cat_ranges([self._path(name)] * len(starts), starts, stops, on_error="raise")
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def put(self, name: str, data: bytes) -> None:
        """Write a file whole, as far as the file system does that: object stores do."""
        with self._told():
            self._make_folder(name)
            self.fs.pipe_file(self._path(name), data)

    def put_file(self, name: str, file: Path) -> None:
        """As `put`, from a file of this machine, in bounded memory."""
        with self._told():
            self._make_folder(name)
            self.fs.put_file(str(file), self._path(name))

    def remove(self, name: str) -> None:
        """Remove a file, or all files below a folder; neither need be there."""
        with self._told(), suppress(FileNotFoundError):
            self.fs.rm(self._path(name), recursive=True)

    def _make_folder(self, name: str) -> None:
        if self._needs_folders:
            self.fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, SpecError, MachineError):
            raise
        except Exception as error:
            raise RemoteError(f"{self.url}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What happened, and what to do."""
    kind = type(error).__name__
    what = (str(error).splitlines() or [kind])[0][:200]
    if kind in NO_CREDENTIALS:
        return f"no credentials ({what}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if kind in UNREACHABLE or isinstance(error, ConnectionError | TimeoutError):
        return f"cannot be reached ({what}); check AWS_ENDPOINT_URL and the network"
    if isinstance(error, PermissionError):
        return f"access denied ({what}); check the credentials and the bucket's policy"
    return f"{what} ({kind})"


def _info(info: dict[str, Any]) -> Info:
    # the keys of s3fs, gcsfs and adlfs, of fsspec's memory, of files and SFTP
    found = next((info[key] for key in ("LastModified", "last_modified", "created", "mtime") if key in info), 0.0)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        found = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    size = int(info.get("size") or 0)
    return Info(size, float(found), f"{info.get('ETag') or info.get('etag') or ''}-{size}-{found}")
