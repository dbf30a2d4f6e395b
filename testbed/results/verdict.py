"""A comparison in a few sentences: which scheme is shown to be best, or what is left open and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from kvstream.testbed.results import stats
from kvstream.testbed.results.paired import Json, Row, is_significant, versus
from kvstream.testbed.results.standing import few
from kvstream.testbed.results.words import SYNTHETIC, interval, many, nats, or_inf, percent

MIN_UNITS: Final = 6
"""With fewer units McNemar's exact test stays above 5 % even if every one of them differs (2 / 2^5)."""


def verdict(summary: Json, counted: Sequence[Mapping[str, Row]]) -> str:
    """The run in words: a winner, or the Pareto set, or why there is neither.

    `summary` is complete except for the verdict; `counted` holds the rows of each unit by scheme.
    """
    units, entries = summary["units"], {entry["scheme"]: entry for entry in summary["schemes"]}
    if units["seen"] and units["invalid"] > summary["max_invalid"] * units["seen"]:
        return _preamble(summary) + _too_invalid(summary)
    if not counted:
        return "No unit has a valid session of every scheme: nothing to compare."
    if not any(entry["met"] for entry in entries.values()):
        return _preamble(summary) + _out_of_reach(list(entries.values()))
    if summary.get("pairs"):
        sentences = _change(summary, entries)
    else:
        sentences = _best(summary, entries, counted)
    return _preamble(summary) + ". ".join(sentences) + "."


def _best(summary: Json, entries: Mapping[str, Json], counted: Sequence[Mapping[str, Row]]) -> list[str]:
    """Sentences about all schemes that are not clairvoyant."""
    standing = summary["standing"]
    judged = [*standing["pareto"], *standing["dominated"]]
    if len(judged) == 1:  # the other ones are clairvoyant
        return [_alone(summary, entries[judged[0]])]
    winner, base = standing["winner"], summary["baseline"]
    if winner:
        if base == winner or entries[base]["clairvoyant"]:
            base = max((name for name in judged if name != winner), key=lambda name: _rank(entries[name]))
        sentences = [_why(summary, entries[winner])]
        sentences += _difference(entries[winner], entries[base], versus(counted, winner, base))
    elif len(judged) == 2:
        more, less = sorted(judged, key=lambda name: _rank(entries[name]), reverse=True)
        sentences = _difference(entries[more], entries[less], versus(counted, more, less))
        sentences.append(
            few(summary)
            or f"Which of them is the better one at the target of {percent(summary['target'])} is not shown"
        )
    else:
        sentences = _open(summary, entries)
    oracle = next((entry for entry in summary["schemes"] if entry["policy"].partition(",")[0] == "oracle"), None)
    if oracle is not None and oracle["distortion"] is not None:
        sentences.append(f"The oracle meets it in {percent(oracle['met_rate'])}, at {oracle['distortion']:.2g} nats")
    return sentences


def _why(summary: Json, best: Json) -> str:
    """The winner, and in what."""
    if summary["standing"]["pareto"] == [best["scheme"]]:
        return f"{best['scheme']} is the best in deadlines met and distortion together"
    feasible = f"{percent(best['feasible'])} of {many(best['feasible_n'], 'feasible unit')}"
    return (
        f"{best['scheme']} has the least distortion of the schemes that keep the target of "
        f"{percent(summary['target'])}: it meets the deadline in {feasible}"
    )


def _open(summary: Json, entries: Mapping[str, Json]) -> list[str]:
    """No winner among three or more schemes: those that are left, and why no more can be said."""
    standing, units = summary["standing"], many(summary["units"]["counted"], "unit")
    pareto, reason = standing["pareto"], few(summary)
    every = len(pareto) + len(standing["dominated"])
    if reason:
        sentences = [f"No scheme is shown to be the best: {reason}"]
    elif len(pareto) == every:
        sentences = ["No scheme is shown to be worse than another in both deadlines met and distortion"]
    else:
        sentences = [f"No single winner: {len(pareto)} of {every} schemes form the Pareto set"]
    listed = [f"{name} {_figures(entries[name])}" for name in pareto]
    sentences.append(f"Deadlines met and distortion over {units}: {', '.join(listed)}")
    if not standing["keeping"] and not reason:
        sentences.append(f"None is shown to keep the target of {percent(summary['target'])} of the feasible units")
    elif len(standing["keeping"]) > 1:
        names = " and ".join((", ".join(standing["keeping"][:-1]), standing["keeping"][-1]))
        sentences.append(f"{names} keep the target of {percent(summary['target'])}, and which distorts least is open")
    return sentences


def _figures(entry: Json) -> str:
    distortion = "" if entry["distortion"] is None else f" at {nats(entry['distortion'])} nats"
    return f"{percent(entry['met_rate'])}{_bracketed(entry)}{distortion}"


def _bracketed(entry: Json) -> str:
    return f" [{found}]" if (found := interval(entry)) else ""


def _alone(summary: Json, entry: Json) -> str:
    share = f"{percent(entry['met_rate'])} of {many(entry['n'], 'unit')}"
    return f"{entry['scheme']} meets the deadline in {share} ({few(summary) or interval(entry)})"


def _rank(entry: Json) -> tuple[int, float]:
    return entry["met"], -or_inf(entry["distortion"])


def _change(summary: Json, entries: Mapping[str, Json]) -> list[str]:
    """Sentences about the pair that differs most, as after a change."""

    def size(name: str) -> tuple[bool, float, float]:
        pair = summary["pairs"][name]
        moved = pair["distortion_low"] is not None and not pair["distortion_low"] <= 0.0 <= pair["distortion_high"]
        return is_significant(pair) or moved, abs(pair["met"] or 0.0), abs(pair["distortion"] or 0.0)

    name = max(summary["pairs"], key=size)
    pair = summary["pairs"][name]
    return _difference(entries[name], entries[pair["baseline"]], pair)


def _difference(ours: Json, base: Json, difference: Json) -> list[str]:
    """Two schemes on the same units: how often, at which distortion, and whether that is significant."""
    significant = is_significant(difference)
    sentences = [
        f"{ours['scheme']} meets the deadline {_how_often(ours, base, significant)}{_at_distortion(ours, base)}"
    ]
    if ours["n"] < MIN_UNITS:
        sentences.append(f"{many(ours['n'], 'unit')} {'is' if ours['n'] == 1 else 'are'} too few to compare rates")
    elif ours["met"] != base["met"]:
        points = 100 * (ours["met_rate"] - base["met_rate"])
        is_it = "is statistically significant" if significant else "is not statistically significant"
        sentences.append(f"The difference of {points:+.0f} points {is_it} (McNemar p = {difference['met_p']:.2g})")
    return sentences


def _preamble(summary: Json) -> str:
    simulated = "Simulated: " if "simulator" in summary["backend"] else ""
    synthetic = SYNTHETIC if any(model.startswith("synthetic") for model in summary["models"]) else ""
    return synthetic + simulated


def _too_invalid(summary: Json) -> str:
    units = summary["units"]
    return (
        f"No verdict: {units['invalid']} of {many(units['seen'], 'unit')} are invalid, more than "
        f"{percent(summary['max_invalid'])}. The link deviated from its trace ({units['invalid_reason']})."
    )


def _out_of_reach(entries: Sequence[Json]) -> str:
    sentence = f"The deadline is out of reach: no scheme meets it in any of {many(entries[0]['n'], 'unit')}."
    arriving = [entry for entry in entries if entry["ttft_p50_s"] is not None]
    if arriving:
        fastest = min(arriving, key=lambda entry: entry["ttft_p50_s"])
        sentence += f" The fastest, {fastest['scheme']}, has a median TTFT of {fastest['ttft_p50_s']:.3g} s."
    return sentence


def _how_often(ours: Json, base: Json, significant: bool) -> str:
    if ours["met"] == base["met"]:
        return f"as often as {base['scheme']} (both {ours['met']}/{ours['n']})"
    if ours["n"] < MIN_UNITS:
        return f"in {ours['met']} of {many(ours['n'], 'unit')}, {base['scheme']} in {base['met']}"
    rate, units = percent(ours["met_rate"]), many(ours["n"], "unit")
    if not significant:
        return f"in {rate} of {units}, {base['scheme']} in {percent(base['met_rate'])}"
    if base["met"] == 0:
        return f"in {rate} of {units}, {base['scheme']} never"
    rates = f"({rate} vs {percent(base['met_rate'])} of {units})"
    if ours["met"] < base["met"]:
        return f"less often than {base['scheme']} {rates}"
    return f"{stats.times(ours['met'] / base['met'])} as often as {base['scheme']} {rates}"


def _at_distortion(ours: Json, base: Json) -> str:
    """Our distortion relative to the baseline's; empty where either is unknown."""
    if ours["distortion"] is None or base["distortion"] is None:
        return ""
    both = f"({nats(ours['distortion'])} vs {nats(base['distortion'])} nats)"
    ratio = ours["distortion"] / base["distortion"] if base["distortion"] else None
    if ours["distortion"] == base["distortion"] or (ratio is not None and 0.95 < ratio < 1.05):
        return f", at the same distortion {both}"
    if ratio is None:
        return f", at higher distortion {both}"
    if ratio == 0.0:
        return f", without distortion {both}"
    how = f"{stats.times(ratio)} higher" if ratio > 1 else f"{stats.times(1 / ratio)} lower"
    return f", at {how} distortion {both}"
