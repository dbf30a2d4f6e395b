"""Codecs by name: those of this package, and plug-ins under the entry point group `kvstream.codecs`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from codec.errors import CodecError

if TYPE_CHECKING:
    from codec.api import Codec, Setting
    from codec.profile import Profile

ENTRY_POINT_GROUP = "kvstream.codecs"

CODECS: dict[str, str] = {
    "raw": "codec.raw:Raw",
    "uniform": "codec.uniform:Uniform",
    "fp8": "codec.uniform:FP8",
    "artifact": "codec.artifact:Artifact",
    "cachegen": "codec.cachegen:CacheGen",
    "kvstream": "codec.kvstream:KVStream",
}
"""Name to `module:class`; imported when first asked for, because torch and numba take seconds."""


def names() -> list[str]:
    """Every known codec, plug-ins included."""
    return sorted({*CODECS, *_plug_ins()})


def codec_class(name: str) -> type[Codec]:
    """The class of a codec. Raises CodecError naming the known ones."""
    from codec.api import Codec

    if name in CODECS:
        module, _, attribute = CODECS[name].partition(":")
        found: Any = getattr(import_module(module), attribute)
    elif name in (plug_ins := _plug_ins()):
        try:
            found = plug_ins[name].load()
        except Exception as error:
            raise CodecError(f"codec plug-in {name!r} ({plug_ins[name].value}) cannot be imported: {error}") from error
    else:
        raise CodecError(f"no codec is called {name!r}; known are {', '.join(names())}")
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise CodecError(f"codec plug-in {name!r} is {found!r}, not a subclass of codec.api.Codec")
    return found


def make(name: str, settings: Mapping[str, Setting] | None = None, profile: Profile | None = None) -> Codec:
    """Build a codec from its name and settings. Raises CodecError naming the settings it has."""
    return codec_class(name).of_settings(settings or {}, profile)


def from_config(config: Mapping[str, Any], profile: Profile | None = None) -> Codec:
    """Rebuild the codec that `Codec.get_config` described (a manifest's `codec` field)."""
    from codec.api import name_and_settings

    name, settings = name_and_settings(config)
    codec = make(name, settings, profile)
    if config.get("profile_sha256") != codec.profile_sha256:
        raise CodecError(f"codec {name} needs profile {config.get('profile_sha256')}, given was {codec.profile_sha256}")
    return codec


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
