"""The profiles that a receiver has, and the codecs built from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstream.codec import registry
from kvstream.codec.profile import Profile
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    from kvstream.codec.api import Codec


class CodecCache:
    """Every codec is built once, however many contexts use it."""

    def __init__(self) -> None:
        self._profiles: dict[str, Profile] = {}
        self._codecs: dict[tuple[str, str | None], Codec] = {}

    def add_profile(self, data: bytes) -> str:
        """Keep a profile; its hash is returned. Raises CodecError for malformed bytes."""
        profile = Profile.from_bytes(data)
        self._profiles[profile.sha256] = profile
        return profile.sha256

    def lacks_profile(self, manifest: Manifest) -> bool:
        return manifest.profile is not None and manifest.profile not in self._profiles

    def codec(self, manifest: Manifest) -> Codec:
        """The codec that a manifest describes. Raises CodecError."""
        key = (str(sorted(manifest.codec.items())), manifest.profile)
        if key not in self._codecs:
            profile = None if manifest.profile is None else self._profiles.get(manifest.profile)
            self._codecs[key] = registry.from_config(manifest.codec, profile)
        return self._codecs[key]
