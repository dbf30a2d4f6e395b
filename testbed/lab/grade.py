"""`kvstream lab grade`: a submitted policy on unseen links, compared with buffer-based and the oracle."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from kvstream.policies import registry
from kvstream.testbed.lab import exercises, jail, sessions
from kvstream.testbed.lab.remote import RemotePolicies
from kvstream.testbed.lab.sessions import PEER
from kvstream.testbed.lab.situation import Situation, load
from kvstream.testbed.results import stats, words
from kvstream.testbed.results import summary as summaries
from kvstream.testbed.session.record import SessionRecord
from kvstream.testbed.workloads import precomputed
from kvstream.traces.library.families import FAMILIES, member
from kvstream.traces.trace import Trace

Json: TypeAlias = dict[str, Any]

PRACTICE: Final = "practice"
"""The public seed; grading uses a secret one."""

LINKS_EACH: Final = 6
"""Links per family."""

OFFSETS_S: Final = (0.0, 7.0)
"""Start offsets of sessions within a link."""

SPREAD: Final = 8.0
"""Each link has a rate of its own, up to so many times another's: no level is right for all."""

FIRST_UNSEEN: Final = 1_000_000
"""Family members from this number on are not in the published halves."""


def held_out(seed: str, links_each: int = LINKS_EACH) -> list[Trace]:
    """Links of every family that only the owner of the seed can reproduce, including those without a feasible plan."""
    links = []
    for family in FAMILIES:
        for number in range(links_each):
            digest = hashlib.sha256(f"{seed}/{family}/{number}".encode()).digest()
            link = member(family, FIRST_UNSEEN + int.from_bytes(digest[:6], "big"))
            share = int.from_bytes(digest[6:10], "big") / 2**32
            rates = precomputed.FAMILY_RATES * SPREAD ** (share - 0.5)
            links.append(link.scaled(rates).renamed(f"{family}-{number}"))
    return links


def grade(spec: str, seed: str = PRACTICE, links_each: int = LINKS_EACH, situation: Situation | None = None) -> Json:
    """The result for an autograder: score, statistics, faults. `spec` names a file and class.

    Raises PolicyError if the file cannot be used at all.
    """
    situation = situation or load()
    began = time.monotonic()
    rows: list[Json] = []
    out_of_reach = 0
    with RemotePolicies(spec) as worker:
        worker.fresh()
        taught = exercises.of_links(sessions.try_all(worker.fresh, situation), situation)
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
    result: Json = {
        "score": round(score, 2),
        "buffer_based_score": round(reference, 2),
        "gain": round(score - reference, 2),
        "gain_low": None if paired.low is None else round(100 * paired.low, 2),
        "gain_high": None if paired.high is None else round(100 * paired.high, 2),
        "practice": seed == PRACTICE,
        "jail": jail.kind(),
        "links": hashlib.sha256(f"links of {seed}".encode()).hexdigest()[:16],
        "sessions": yours["n"],
        "out_of_reach": out_of_reach,
        "violations": 1 - yours["met_rate"],
        "violations_buffer_based": 1 - peer["met_rate"],
        **_difference("violations", *(_violated(versus[key]) for key in ("met", "met_high", "met_low"))),
        "violations_p": versus["met_p"],
        "distortion": yours["distortion"],
        "distortion_buffer_based": peer["distortion"],
        "regret": yours["regret"],
        "regret_buffer_based": peer["regret"],
        **_difference("regret", regret.value, regret.low, regret.high),
        "regret_difference_n": regret.n,
        "faults": yours["policy_faults"],
        "first_traceback": first_traceback,
        "seconds": round(time.monotonic() - began, 2),
        "policy_sha256": _digest(spec),
    }
    return result | {"exercises": [one.to_json() for one in (*taught, *exercises.of_grade(result))]}


def _difference(name: str, value: float | None, low: float | None, high: float | None) -> Json:
    """Yours minus buffer-based's, with its interval over links."""
    return {f"{name}_difference": value, f"{name}_difference_low": low, f"{name}_difference_high": high}


def _violated(met: float | None) -> float | None:
    """A difference in deadlines met as a difference in SLO violations."""
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
    """The result as Gradescope's results.json, which other autograders read too."""
    return {
        "score": result["score"],
        "execution_time": result["seconds"],
        "output": text(result),
        "visibility": "visible",
        "tests": [
            {
                "name": f"Exercise {one['number']}: {one['title']}",
                "status": "passed" if one["passed"] else "failed",
                "score": int(one["passed"]),
                "max_score": 1,
                "output": one["why"],
            }
            for one in result["exercises"]
        ],
        "leaderboard": [
            {"name": "score", "value": result["score"]},
            {"name": "SLO violations (%)", "value": round(100 * result["violations"], 1), "order": "asc"},
        ],
    }


def text(result: Mapping[str, Any]) -> str:
    """The result as text."""
    gain = _interval(result["gain_low"], result["gain_high"], "+.1f")
    faults = []
    if result["faults"]:
        faults = [f"{result['faults']} invalid choices. {result['first_traceback']}".rstrip(), ""]
    lines = [
        *faults,
        ("Public practice links. " if result["practice"] else "")
        + f"{words.many(result['sessions'], 'session')}; {result['out_of_reach']} more on which no policy can meet the "
        "deadline.",
        f"Score {result['score']:.1f} of 100 ({PEER} {result['buffer_based_score']:.1f}); "
        f"difference {result['gain']:+.1f}{gain}",
        _violations(result),
    ]
    if result["regret"] is not None and result["regret_buffer_based"] is not None:
        lines.append(_regret(result))
    lines += [str(exercises.Result(**one)) for one in result["exercises"]]
    return "\n".join(lines)


def _violations(result: Mapping[str, Any]) -> str:
    mine, peer = 100 * result["violations"], 100 * result["violations_buffer_based"]
    points, low, high = (
        None if value is None else 100 * value
        for value in (result[f"violations_difference{end}"] for end in ("", "_low", "_high"))
    )
    return (
        f"SLO violations: {mine:.0f} % ({PEER} {peer:.0f} %); difference {points:+.1f} points"
        f"{_interval(low, high, '+.1f')}, McNemar p = {result['violations_p']:.2g}"
    )


def _regret(result: Mapping[str, Any]) -> str:
    mine, peer = (words.nats(result[f"regret{end}"]) for end in ("", "_buffer_based"))
    text = f"Regret where met: {mine} nats ({PEER} {peer})"
    if result["regret_difference"] is None:
        return text
    interval = _interval(result["regret_difference_low"], result["regret_difference_high"], "+.2g")
    both = words.many(result["regret_difference_n"], "session")
    gap = words.nats(result["regret_difference"], "+")
    return f"{text}; difference {gap}{interval} over the {both} that both met"


def _interval(low: float | None, high: float | None, form: str) -> str:
    """` [95 % interval -0.3 to +1.2]`; empty where there is none."""
    return "" if low is None or high is None else f" [95 % interval {low:{form}} to {high:{form}}]"


def _worth(row: Mapping[str, Any], situation: Situation) -> float:
    """A session's worth: 0 for an SLO violation, else from 1 (the oracle's distortion) to 0 (the smallest level's)."""
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
