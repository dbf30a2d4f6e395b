"""From a spec as written to the thing itself: policies, codecs, links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from policies import registry as policy_registry
from policies.api import Policy
from policies.errors import PolicyError
from policies.measures import named_level
from testbed import specs
from testbed.errors import SpecError

if TYPE_CHECKING:
    from testbed.emulator.link import LinkSettings


def make_policy(text: str) -> Policy:
    """A fresh policy from `mpc,horizon=5` or `./mine.py:MyPolicy,gain=2`. Raises PolicyError or SpecError."""
    spec = specs.parse(text, "policy")
    cls = policy_registry.policy_class(spec.name)
    try:
        policy: Policy = specs.build(cls, spec.settings, f"policy {spec.name}")
    except (SpecError, PolicyError):
        raise
    except (Exception, SystemExit) as error:  # a student's constructor may raise anything
        raise PolicyError(f"policy {spec.name} cannot be built: {type(error).__name__}: {error}") from error
    return policy


def check_levels(text: str, n_levels: int) -> None:
    """Raise PolicyError if a policy of ours is set to a level that a context of `n_levels` does not have."""
    policy = make_policy(text)
    if not type(policy).__module__.startswith("policies."):  # elsewhere these names may mean anything
        return
    for name in ("level", "first"):
        level = getattr(policy, name, None)
        if level is not None:
            try:
                named_level(level, n_levels)
            except PolicyError as error:
                raise PolicyError(f"policy {text}: {error}") from None


def is_clairvoyant(text: str) -> bool:
    """Whether the policy of a spec is told the future."""
    return policy_registry.is_clairvoyant(policy_registry.policy_class(specs.parse(text, "policy").name))


def codec_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of `cachegen,coder=ac`; numbers become numbers, the codec itself checks the rest."""
    spec = specs.parse(text, "codec")
    settings: dict[str, Any] = {}
    for key, value in spec.settings.items():
        try:
            settings[key] = specs.coerce(value, int | float, key)
        except SpecError:
            settings[key] = value
    return spec.name, settings


def make_link(text: str) -> LinkSettings:
    """Link settings from `delay=20ms,queue=50ms,cc=cubic`; an empty text gives the defaults."""
    from testbed.emulator.link import LinkSettings

    return specs.build(LinkSettings, specs.parse_settings(text, "link"), "link")
