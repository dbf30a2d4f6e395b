"""The process in which a handed-in policy runs: it sees observations and answers choices, one JSON line each.

Links, deadlines of other sessions and the oracle stay in the grader's process, so a policy cannot look the future up.
Memory, processor time, file size and open files are limited before the file is imported. This keeps honest mistakes
from hurting; it is not a jail for hostile code (see the instructor's page).

Requests: {"new": true}, {"choose": observation}, {"progress": observation}. Answers: {"ok": ...} or {"error": text}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Final

from policies.api import Choice, InFlight, Observation, Replace, Transfer

MEMORY_BYTES: Final = 1 << 30
CPU_S: Final = 120
FILE_BYTES: Final = 1 << 20
OPEN_FILES: Final = 64


def limit() -> None:
    """Give this process its limits; they also hold for what it starts."""
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def observation_to_json(obs: Observation) -> dict[str, Any]:
    return {field.name: _plain(getattr(obs, field.name)) for field in dataclasses.fields(obs)}


def observation_from_json(data: Mapping[str, Any]) -> Observation:
    values = {key: _tuples(value) for key, value in data.items()}
    values["transfers"] = tuple(Transfer(**one) for one in data["transfers"])
    values["in_flight"] = tuple(InFlight(**one) for one in data["in_flight"])
    return Observation(**values)


def choice_to_json(choice: object) -> dict[str, Any]:
    """A Choice as plain data; anything else becomes a text that the session will refuse."""
    if not isinstance(choice, Choice):
        return {"nonsense": repr(choice)[:200]}
    return {
        "level": choice.level if isinstance(choice.level, int | str) else repr(choice.level),
        "chunk": choice.chunk,
        "reason": {str(key): float(value) for key, value in choice.reason.items()},
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def main() -> None:
    """`python -m testbed.lab.worker SPEC`: serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a policy prints must not mix with the answers
    limit()
    from testbed.lab.submission import make

    policy: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "new" in request:
                policy = make(sys.argv[1])
                answer: Any = {"progress": callable(getattr(policy, "progress", None))}
            elif "choose" in request:
                answer = choice_to_json(policy.choose(observation_from_json(request["choose"])))
            else:
                said = policy.progress(observation_from_json(request["progress"]))
                answer = {"replace": said.level} if isinstance(said, Replace) else said
            reply = json.dumps({"ok": answer})
        except BaseException as error:  # whatever a policy does, the grader hears of it
            words = f"{type(error).__name__}: {error}"
            reply = json.dumps({"error": words[:500], "traceback": traceback.format_exc(limit=-3)[-2000:]})
        answers.write(reply + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
