"""`kvstream lab grade`: a handed-in policy on links that nobody has seen, against buffer-based and the oracle."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from policies import registry
from testbed import stats, typed
from testbed import summary as summaries
from testbed.errors import SpecError
from testbed.lab.check import PEER
from testbed.lab.remote import RemotePolicies
from testbed.lab.situation import Situation, load
from testbed.session import SessionRecord
from traces.library.families import FAMILIES, member
from traces.trace import Trace

Json: TypeAlias = dict[str, Any]

PRACTICE: Final = "practice"
"""The seed that everyone knows; grading uses a secret one."""

LINKS_EACH: Final = 6
"""Links of each family."""

OFFSETS_S: Final = (0.0, 7.0)
"""Where in a link a session begins."""

SETTLED: Final = 1_000_000
"""Family members from here on are in no published half."""


def held_out(seed: str, links_each: int = LINKS_EACH) -> list[Trace]:
    """Links of every family that only the seed's keeper can make again; those on which no deadline can be met, too."""
    links = []
    for family in FAMILIES:
        for number in range(links_each):
            digest = hashlib.sha256(f"{seed}/{family}/{number}".encode()).digest()
            links.append(member(family, SETTLED + int.from_bytes(digest[:6], "big")).renamed(f"{family}-{number}"))
    return links


def grade(spec: str, seed: str = PRACTICE, links_each: int = LINKS_EACH, situation: Situation | None = None) -> Json:
    """The result for an autograder: score, statistics, what went wrong. `spec` names a file and class.

    Raises PolicyError if the file cannot be used at all.
    """
    situation = situation or load()
    began = time.monotonic()
    rows: list[Json] = []
    out_of_reach = 0
    with RemotePolicies(spec) as worker:
        worker.fresh()
        for trace in held_out(seed, links_each):
            for offset_s in OFFSETS_S:
                link = trace.shifted(offset_s)
                plan = situation.best(link)
                if plan is None:
                    out_of_reach += 1
                    continue
                for scheme, policy in (("yours", worker.fresh()), (PEER, registry.make(PEER))):
                    record = situation.run(policy, link)
                    rows.append(_row(scheme, trace, offset_s, record, plan.distortion, situation))
        first_traceback = worker.first_traceback
    summary = summaries.summarise(rows, ("yours", PEER), PEER)
    yours, peer = summary["schemes"]
    worth = {scheme: [_worth(row, situation) for row in rows if row["scheme"] == scheme] for scheme in ("yours", PEER)}
    gain = [mine - theirs for mine, theirs in zip(worth["yours"], worth[PEER], strict=True)]
    links = [row["trace"] for row in rows if row["scheme"] == "yours"]
    paired = stats.clustered_mean(gain, links)
    score, reference = (100 * sum(worth[scheme]) / len(worth[scheme]) for scheme in ("yours", PEER))
    versus, regret = yours["versus"], _regret_difference(rows)
    return {
        "score": round(score, 2),
        "buffer_based_score": round(reference, 2),
        "gain": round(score - reference, 2),
        "gain_low": None if paired.low is None else round(100 * paired.low, 2),
        "gain_high": None if paired.high is None else round(100 * paired.high, 2),
        "practice": seed == PRACTICE,
        "sessions": yours["n"],
        "out_of_reach": out_of_reach,
        "violations": 1 - yours["met_rate"],
        "violations_buffer_based": 1 - peer["met_rate"],
        **_difference("violations", *(_missed_by(versus[key]) for key in ("met", "met_high", "met_low"))),
        "violations_p": versus["met_p"],
        "regret": yours["regret"],
        "regret_buffer_based": peer["regret"],
        **_difference("regret", regret.value, regret.low, regret.high),
        "regret_difference_n": regret.n,
        "faults": yours["policy_faults"],
        "first_traceback": first_traceback,
        "seconds": round(time.monotonic() - began, 2),
        "policy_sha256": _digest(spec),
    }


def _difference(name: str, value: float | None, low: float | None, high: float | None) -> Json:
    """Yours minus buffer-based's, with its interval over links."""
    return {f"{name}_difference": value, f"{name}_difference_low": low, f"{name}_difference_high": high}


def _missed_by(met: float | None) -> float | None:
    """A difference in deadlines met as one in deadlines missed."""
    return None if met is None else 0.0 - met


def _regret_difference(rows: Sequence[Json]) -> stats.Mean:
    """Yours minus buffer-based's over the sessions in which both met the deadline."""
    regrets: dict[str, dict[str, Json]] = {}
    for row in rows:
        if row["regret"] is not None:
            regrets.setdefault(row["unit_id"], {})[row["scheme"]] = row
    both = [pair for pair in regrets.values() if len(pair) == 2]
    return stats.paired_difference(
        [pair["yours"]["regret"] for pair in both],
        [pair[PEER]["regret"] for pair in both],
        [pair[PEER]["trace"] for pair in both],
    )


def gradescope(result: Mapping[str, Any]) -> Json:
    """The same as Gradescope's results.json, which other autograders read too."""
    return {
        "score": result["score"],
        "execution_time": result["seconds"],
        "output": text(result),
        "visibility": "visible",
        "leaderboard": [
            {"name": "score", "value": result["score"]},
            {"name": "deadlines missed (%)", "value": round(100 * result["violations"], 1), "order": "asc"},
        ],
    }


def text(result: Mapping[str, Any]) -> str:
    """For people."""
    gain = _interval(result["gain_low"], result["gain_high"], "+.1f")
    lines = [
        ("Practice links, known to everyone. " if result["practice"] else "")
        + f"{result['sessions']} sessions; {result['out_of_reach']} more on which no policy could meet the deadline.",
        f"Score {result['score']:.1f} of 100 ({PEER} {result['buffer_based_score']:.1f}); "
        f"difference {result['gain']:+.1f}{gain}",
        _missed(result),
    ]
    if result["regret"] is not None and result["regret_buffer_based"] is not None:
        lines.append(_regret(result))
    if result["faults"]:
        lines.append(f"{result['faults']} choices could not be used. {result['first_traceback']}".rstrip())
    return "\n".join(lines)


def _missed(result: Mapping[str, Any]) -> str:
    mine, peer = 100 * result["violations"], 100 * result["violations_buffer_based"]
    points, low, high = (
        None if value is None else 100 * value
        for value in (result[f"violations_difference{end}"] for end in ("", "_low", "_high"))
    )
    return (
        f"Deadlines missed: {mine:.0f} % ({PEER} {peer:.0f} %); difference {points:+.1f} points"
        f"{_interval(low, high, '+.1f')}, McNemar p = {result['violations_p']:.2g}"
    )


def _regret(result: Mapping[str, Any]) -> str:
    mine, peer = (summaries.nats(result[f"regret{end}"]) for end in ("", "_buffer_based"))
    words = f"Regret where met: {mine} nats ({PEER} {peer})"
    if result["regret_difference"] is None:
        return words
    interval = _interval(result["regret_difference_low"], result["regret_difference_high"], "+.2g")
    both = summaries.many(result["regret_difference_n"], "session")
    gap = summaries.nats(result["regret_difference"], "+")
    return f"{words}; difference {gap}{interval} over the {both} that both met"


def _interval(low: float | None, high: float | None, form: str) -> str:
    """` [95 % interval -0.3 to +1.2]`; empty where there is none."""
    return "" if low is None or high is None else f" [95 % interval {low:{form}} to {high:{form}}]"


def _worth(row: Mapping[str, Any], situation: Situation) -> float:
    """A session's worth: 0 for a missed deadline, 1 for the oracle's distortion, 0 for that of the smallest level."""
    if not row["met"]:
        return 0.0
    span = situation.worst - row["oracle_distortion"]
    return max(0.0, 1.0 - row["regret"] / span) if span > 0 else 1.0


def _row(
    scheme: str,
    trace: Trace,
    offset_s: float,
    record: SessionRecord | None,
    oracle_distortion: float,
    situation: Situation,
) -> Json:
    met = record is not None and record.met
    return {
        "unit_id": f"{trace.name}+{offset_s:g}",
        "scheme": scheme,
        "policy": scheme,
        "codec": str(situation.manifest.codec.get("id", "")),
        "clairvoyant": False,
        "model": situation.manifest.model,
        "backend": "simulator",
        "trace": trace.name,
        "status": "ok" if record else "failed",
        "deadline_s": situation.deadline_s,
        "ttft_s": record.ttft_s if record else None,
        "met": met,
        "distortion": record.distortion if record else None,
        "measured_kl": None,
        "answers_right": None,
        "answers": None,
        "bytes": record.bytes if record else None,
        "wasted_bytes": record.wasted_bytes if record else None,
        "policy_faults": record.policy_faults if record else 0,
        "oracle_distortion": oracle_distortion,
        "regret": max(0.0, record.distortion - oracle_distortion) if record and met else None,
        "fidelity": {},
        "repeats": 0,
    }


def _digest(spec: str) -> str:
    path = Path(spec.partition(",")[0].rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".py" else ""


def save(result: Mapping[str, Any], name: str, file: Path) -> None:
    """Write a result with the hand-in's name, as `lab leaderboard` reads it."""
    file.write_text(json.dumps({"name": name, **result}, indent=1) + "\n", encoding="utf-8")


_RESULT: Final[Json] = {
    "name": str,
    "score": float,
    "sessions": int,
    "practice": bool,
    "violations": float,
    "gain": float,
    "gain_low": float | None,
    "gain_high": float | None,
}
"""What the leaderboard reads of a result."""


def board(files: Sequence[Path]) -> list[Json]:
    """Results of `save`, best score first.

    Raises SpecError for a file that is no result.
    """
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or not _RESULT.keys() <= result.keys():
                raise ValueError(f"it lacks one of {', '.join(_RESULT)}")
            typed.check(result, _RESULT)
        except (ValueError, OSError) as error:
            raise SpecError(f"{file}: not a result of kvstream lab grade --output ({error})") from None
        results.append(result)
    return sorted(results, key=lambda one: (-one["score"], one["name"]))


def board_text(results: Sequence[Mapping[str, Any]]) -> str:
    """A table, best first. Ranks are shared while a result is within the interval of the one that leads its rank."""
    lines = [f"{'rank':>4}  {'name':<24}{'score':>7}  {'against ' + PEER:<32}{'missed':>7}"]
    rank, floor = 0, math.inf
    for place, one in enumerate(results, start=1):
        half = 0.0 if one["gain_low"] is None else (one["gain_high"] - one["gain_low"]) / 2
        if one["score"] < floor:
            rank, floor = place, one["score"] - half
        low_high = "" if one["gain_low"] is None else f" [{one['gain_low']:+.1f}, {one['gain_high']:+.1f}]"
        gain = f"{one['gain']:+.1f}{low_high}"
        missed = f"{100 * one['violations']:.0f} %"
        practice = "  practice links" if one["practice"] else ""
        lines.append(f"{rank:>4}  {one['name'][:23]:<24}{one['score']:>7.1f}  {gain:<32}{missed:>7}{practice}")
    return "\n".join(lines)
