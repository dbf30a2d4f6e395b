"""Sweeps: settings of schemes, each with several values, so that one scheme becomes one for every combination.

`policy.safety=0.5,0.7,0.9` sets a setting of the policies that have it, `codec.coder=ac,rans` one of the codecs;
`codec=kvstream,cachegen`, `depth=1,2` and `overlap=on,off` are keys of schemes. A scheme that gives the setting itself
stays as it is, and so do reference lines.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, get_type_hints

from kvstream.policies import registry
from kvstream.testbed.config import specs
from kvstream.testbed.config.experiment import Experiment, checked
from kvstream.testbed.config.units import Scheme, safe, told_apart
from kvstream.testbed.errors import SpecError
from kvstream.traces.grammar import brief
from kvstream.traces.nearest import nearest

PARTS: Final = ("policy", "codec")
"""Of a scheme, those that have settings."""
KEYS: Final = ("codec", "depth", "overlap")
"""Keys of a scheme that can be swept themselves."""


@dataclass(frozen=True)
class Sweep:
    """One setting and its values as written; `part` is empty for a key of the scheme itself."""

    part: str
    key: str
    values: tuple[str, ...]

    @property
    def setting(self) -> str:
        """As it is written: `policy.safety`, `depth`."""
        return f"{self.part}.{self.key}" if self.part else self.key


def parse(text: str) -> Sweep:
    """`policy.safety=0.5,0.7` to a Sweep. Raises SpecError."""
    setting, equals, listed = (piece.strip() for piece in text.partition("="))
    part, dot, key = setting.rpartition(".")
    values = tuple(value.strip() for value in listed.split(","))
    if not equals or not key or not all(values):
        raise SpecError(f"sweep {brief(text)}: write a setting and its values, as in policy.safety=0.5,0.7,0.9")
    if dot and part not in PARTS:
        raise SpecError(f"sweep {brief(text)}: unknown part {brief(part)} of a scheme; {nearest(part, PARTS)}")
    if not dot and key not in KEYS:
        meant = f"did you mean policy.{key[:40]} or codec.{key[:40]}? Otherwise choose from {', '.join(KEYS)}"
        raise SpecError(f"sweep {brief(text)}: a scheme has no {brief(key)} to sweep; {meant}")
    if len(set(values)) < len(values):
        raise SpecError(f"sweep {brief(text)}: a value is given twice")
    return Sweep(part, key, values)


def expanded(experiment: Experiment) -> Experiment:
    """The experiment with a scheme for every combination of the values of its `sweep`.

    Files of policies are imported to see which settings they have. Raises SpecError or PolicyError.
    """
    sweeps = [parse(text) for text in experiment.sweep]
    settings = [sweep.setting for sweep in sweeps]
    for setting in settings:
        if settings.count(setting) > 1:
            raise SpecError(f"sweep: {setting} is given twice; give all its values at once")
    if not sweeps:
        return experiment
    made: list[Scheme] = []
    used: set[str] = set()
    first: dict[str, int] = {}
    for scheme in experiment.schemes:
        own = [] if scheme.reference else [sweep for sweep in sweeps if _applies(sweep, scheme)]
        variants = [_with(scheme, dict(zip(own, values, strict=True)))
                    for values in itertools.product(*(sweep.values for sweep in own))]  # fmt: skip
        first[scheme.name] = len(made)
        made += variants
        used.update(sweep.setting for sweep in own)
    for sweep in sweeps:
        if sweep.setting not in used:
            raise SpecError(f"sweep of {sweep.setting}: {_nowhere(sweep, experiment.schemes)}")
    schemes = told_apart(made)
    baseline = schemes[first[experiment.baseline]].name if experiment.baseline else ""
    return checked(replace(experiment, schemes=schemes, baseline=baseline))


def families(schemes: Iterable[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """[what the schemes of a line share]: (scheme's name, value of the first sweep), in the order of the values.

    `schemes` are those of a run's manifest; those that are not swept are in none.
    """
    sweeps, entries = [parse(text) for text in texts], list(schemes)
    found: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        values = {sweep.setting: value for sweep in sweeps if (value := _value(sweep, entry)) in sweep.values}
        own = [sweep for sweep in sweeps if sweep.setting in values]
        if own and not entry.get("reference"):
            first, *others = own
            told = [f"{one.key}={values[one.setting]}" for one in others]
            if len({one["codec"] for one in entries if not one.get("reference")}) > 1 and not any(
                "codec" in (one.part, one.key) for one in own
            ):
                told.append(f"codec={entry['codec']}")
            shared = ", ".join([_plain(entry, own), *told])
            found.setdefault(shared, []).append((entry["name"], f"{first.key}={values[first.setting]}"))
    return {shared: members for shared, members in found.items() if len(members) > 1}


def _applies(sweep: Sweep, scheme: Scheme) -> bool:
    """Whether the scheme has this setting, and does not give it itself."""
    if sweep.part != "policy":
        return not sweep.part or sweep.key not in specs.parse(scheme.codec, "codec").settings
    spec = specs.parse(scheme.policy, "policy")
    names = _names(spec.name, sweep.key)
    return bool(names) and not names & spec.settings.keys()


def _names(policy: str, key: str) -> set[str]:
    """What a setting of a policy is called (`delay` and `delay_s`); empty if it has no such."""
    known = _settings(policy)
    fits = [name for name in known if key == name or (specs.has_unit(name) and key == name.rpartition("_")[0])]
    return {key, *fits} if fits else set()


def _settings(policy: str) -> list[str]:
    cls = registry.policy_class(policy)
    if not dataclasses.is_dataclass(cls):
        return []
    return [f.name for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")]


def _with(scheme: Scheme, values: Mapping[Sweep, str]) -> Scheme:
    """The scheme with these values; its label, if it has one, tells them."""
    changes: dict[str, Any] = {}
    for part in PARTS:
        own = {sweep.key: value for sweep, value in values.items() if sweep.part == part}
        if own:
            spec = specs.parse(getattr(scheme, part), part)
            changes[part] = str(specs.Spec(spec.name, {**spec.settings, **own}))
    hints = get_type_hints(Scheme)
    for sweep, value in values.items():
        if not sweep.part:
            changes[sweep.key] = specs.coerce(value, hints[sweep.key], sweep.key)
    if scheme.label and values:
        told = ",".join(f"{sweep.key}={safe(value)}" for sweep, value in values.items())
        changes["label"] = f"{scheme.label}({told})"
    return replace(scheme, **changes)


def _nowhere(sweep: Sweep, schemes: Sequence[Scheme]) -> str:
    """Why no scheme took a sweep."""
    compared = [specs.parse(scheme.policy, "policy").name for scheme in schemes if not scheme.reference]
    if sweep.part == "policy" and not any(_names(policy, sweep.key) for policy in compared):
        known = sorted({name for policy in compared for name in _settings(policy)})
        return f"no policy here has a setting {brief(sweep.key)}; {nearest(sweep.key, known)}"
    return "every scheme that has it gives it itself; leave it out there"


def _value(sweep: Sweep, entry: Mapping[str, Any]) -> str:
    """The setting's value in a scheme of a manifest, as written; empty where it has none."""
    if sweep.part:
        return specs.parse(entry[sweep.part], sweep.part).settings.get(sweep.key, "")
    value = entry[sweep.key]
    written = [text for text in sweep.values if specs.coerce(text, type(value), sweep.key) == value]
    return written[0] if written else ""


def _plain(entry: Mapping[str, Any], own: Sequence[Sweep]) -> str:
    """What is left of a scheme's name without the swept settings."""
    label = str(entry.get("label", ""))
    if label.endswith(")") and "(" in label:
        return label.partition("(")[0]
    policy = specs.parse(entry["policy"], "policy")
    swept = {sweep.key for sweep in own if sweep.part == "policy"}
    left = {key: value for key, value in policy.settings.items() if key not in swept}
    keys = {sweep.setting for sweep in own}
    depth = Scheme.depth if "depth" in keys else entry["depth"]
    overlap = Scheme.overlap if "overlap" in keys else entry["overlap"]
    return Scheme(str(specs.Spec(policy.name, left)), "", depth, overlap).name
