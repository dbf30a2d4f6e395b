"""From a spec as written to the thing itself: policies, codecs, links."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.codec import registry as codec_registry
from kvstream.codec.errors import CodecError
from kvstream.policies import registry as policy_registry
from kvstream.policies.api import Policy
from kvstream.policies.errors import PolicyError
from kvstream.policies.measures import named_level
from kvstream.testbed.config import specs
from kvstream.testbed.errors import SpecError

if TYPE_CHECKING:
    from kvstream.testbed.emulator.link import LinkSettings


def make_policy(text: str) -> Policy:
    """A fresh policy from `mpc,horizon=5` or `./mine.py:MyPolicy,gain=2`. Raises PolicyError or SpecError."""
    spec = specs.parse(text, "policy")
    cls = policy_registry.policy_class(spec.name)
    try:
        policy: Policy = specs.build(cls, spec.settings, f"policy {spec.name}")
    except (SpecError, PolicyError):
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a student's constructor may raise anything
        raise PolicyError(f"policy {spec.name} cannot be built: {type(error).__name__}: {error}") from error
    return policy


def check_levels(text: str, n_levels: int) -> None:
    """Raise PolicyError if a policy of ours is set to a level that a context of `n_levels` does not have."""
    policy = make_policy(text)
    if not type(policy).__module__.startswith("kvstream.policies."):  # elsewhere these names may mean anything
        return
    for name in ("level", "first"):
        level = getattr(policy, name, None)
        if level is not None:
            try:
                named_level(level, n_levels)
            except PolicyError as error:
                raise PolicyError(f"policy {text}: {error}") from None


def is_clairvoyant(text: str) -> bool:
    """Whether the policy of a spec is clairvoyant: sees the future trace."""
    return policy_registry.is_clairvoyant(policy_registry.policy_class(specs.parse(text, "policy").name))


def codec_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of `cachegen,coder=ac`; numbers become numbers, the codec itself checks the rest.

    Of `./mine.py:Zip` the file is imported, and the name is the class's `codec_id`. Raises CodecError or SpecError.
    """
    spec = specs.parse(text, "codec")
    name = _codec_from_file(spec.name) if ".py:" in spec.name else spec.name
    settings: dict[str, Any] = {}
    for key, value in spec.settings.items():
        try:
            settings[key] = specs.coerce(value, int | float, key)
        except SpecError:
            settings[key] = value
    return name, settings


def _codec_from_file(name: str) -> str:
    try:
        cls = policy_registry.class_from_file(name, "codec", "encode")
    except PolicyError as error:
        raise CodecError(str(error)) from error
    path = Path(name.rpartition(":")[0]).resolve()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return codec_registry.add(codec_registry.FromFile(cls, str(path), digest))


def make_link(text: str) -> LinkSettings:
    """Link settings from `delay=20ms,queue=50ms,cc=cubic`; an empty text gives the defaults."""
    from kvstream.testbed.emulator.link import LinkSettings

    return specs.build(LinkSettings, specs.parse_settings(text, "link"), "link")
