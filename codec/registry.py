"""Codecs by name: those of this package, plug-ins under the entry point group `kvstream.codecs`, and classes from files
that this process was given.

What comes over a network names a codec by its id only: no manifest can make a receiver import a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from kvstream.codec.errors import CodecError

if TYPE_CHECKING:
    from kvstream.codec.api import Codec, Setting
    from kvstream.codec.profile import Profile

ENTRY_POINT_GROUP = "kvstream.codecs"

CODECS: dict[str, str] = {
    "raw": "kvstream.codec.raw:Raw",
    "uniform": "kvstream.codec.uniform:Uniform",
    "fp8": "kvstream.codec.uniform:FP8",
    "artifact": "kvstream.codec.artifact:Artifact",
    "kivi": "kvstream.codec.kivi:KIVI",
    "cachegen": "kvstream.codec.cachegen:CacheGen",
    "kvtc": "kvstream.codec.kvtc:KVTC",
    "kvstream": "kvstream.codec.kvstream.codec:KVStream",
}
"""Name to `module:class`; imported on first use, because torch and numba take seconds."""


@dataclass(frozen=True)
class FromFile:
    """A codec's class from a file, and the file's path and SHA-256."""

    cls: type[Codec]
    path: str
    sha256: str


_FROM_FILES: dict[str, FromFile] = {}
"""By codec id."""


def names() -> list[str]:
    """Every codec, plug-ins and classes from files included."""
    return sorted({*CODECS, *_plug_ins(), *_FROM_FILES})


def add(found: FromFile) -> str:
    """Make a class from a file known by its `codec_id`, which is returned; a new version of the file replaces an older
    one. Raises CodecError for what is no codec, and for an id that another codec has."""
    from kvstream.codec.api import Codec

    cls = found.cls
    if not (isinstance(cls, type) and issubclass(cls, Codec)):
        raise CodecError(f"codec file {found.path}: {cls!r} is not a subclass of kvstream.Codec")
    name = getattr(cls, "codec_id", None)
    if not isinstance(name, str) or not name:
        raise CodecError(f"codec file {found.path}: {cls.__name__} has no codec_id; give it a name of its own")
    before = _FROM_FILES.get(name)
    if name in CODECS or name in _plug_ins() or (before and before.path != found.path):
        whose = f"that of {before.path}" if before else "taken by a codec that is installed"
        raise CodecError(f"codec file {found.path}: the codec_id {name!r} is {whose}; choose another")
    _FROM_FILES[name] = found
    return name


def identity(codec: Codec) -> dict[str, Any]:
    """What the bytes of a codec depend on: its configuration, and the content of the file that it is from, if any."""
    found = _FROM_FILES.get(codec.codec_id)
    return codec.get_config() | ({} if found is None else {"file_sha256": found.sha256})


def version(name: str) -> str:
    """Tells versions of a codec from a file apart; empty for all others."""
    found = _FROM_FILES.get(name)
    return "" if found is None else found.sha256[:12]


def codec_class(name: str) -> type[Codec]:
    """The class of a codec. Raises CodecError listing the available ones."""
    from kvstream.codec.api import Codec

    if name in CODECS:
        module, _, attribute = CODECS[name].partition(":")
        found: Any = getattr(import_module(module), attribute)
    elif name in (plug_ins := _plug_ins()):
        try:
            found = plug_ins[name].load()
        except Exception as error:
            raise CodecError(f"codec plug-in {name!r} ({plug_ins[name].value}) cannot be imported: {error}") from error
    elif name in _FROM_FILES:
        found = _FROM_FILES[name].cls
    else:
        raise CodecError(unknown(name))
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise CodecError(f"codec plug-in {name!r} is {found!r}, not a subclass of codec.api.Codec")
    return found


def unknown(name: str) -> str:
    """What to say of a codec that does not exist: the nearest, or all there are."""
    close = difflib.get_close_matches(name, names(), n=2)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names())}, or give ./file.py:Class"
    )
    return f"unknown codec {name[:60]!r}; {hint}"


def make(name: str, settings: Mapping[str, Setting] | None = None, profile: Profile | None = None) -> Codec:
    """Build a codec from its name and settings. Raises CodecError listing the settings it has."""
    return codec_class(name).of_settings(settings or {}, profile)


def from_config(config: Mapping[str, Any], profile: Profile | None = None) -> Codec:
    """Rebuild the codec that `Codec.get_config` described (a manifest's `codec` field)."""
    from kvstream.codec.api import name_and_settings

    name, settings = name_and_settings(config)
    codec = make(name, settings, profile)
    if config.get("profile_sha256") != codec.profile_sha256:
        raise CodecError(
            f"codec {name} needs profile {config.get('profile_sha256')}, but was given {codec.profile_sha256}"
        )
    return codec


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
