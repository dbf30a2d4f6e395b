"""The process of a submitted policy: it gets observations and answers with choices, one JSON line each.

Links, deadlines of other sessions and the oracle stay in the grader's process, so a policy cannot look up the future.
Memory, processor time, file size, open files and processes are limited before the file is imported; what else the
process can reach is up to `kvstream.testbed.lab.jail`.

Requests: {"new": true}, {"choose": observation}, {"progress": observation}. Answers: {"ok": ...} or {"error": text}.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import os
import resource
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Final

from kvstream.policies.api import Choice, Computed, InFlight, Observation, Replace, Transfer

MEMORY_BYTES: Final = 1 << 30
CPU_S: Final = 120
FILE_BYTES: Final = 1 << 20
OPEN_FILES: Final = 64
PROCESSES: Final = 64


def limit() -> None:
    """Set this process's resource limits, which its children inherit."""
    for what, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def observation_to_json(obs: Observation) -> dict[str, Any]:
    return {field.name: _plain(getattr(obs, field.name)) for field in dataclasses.fields(obs)}


def observation_from_json(data: Mapping[str, Any]) -> Observation:
    values = {key: _tuples(value) for key, value in data.items()}
    values["transfers"] = tuple(Transfer(**one) for one in data["transfers"])
    values["in_flight"] = tuple(InFlight(**one) for one in data["in_flight"])
    values["computed"] = tuple(Computed(**one) for one in data["computed"])
    return Observation(**values)


def choice_to_json(choice: object) -> dict[str, Any]:
    """A Choice as plain data; anything else as a string that the session refuses."""
    if not isinstance(choice, Choice):
        return {"invalid": repr(choice)[:200]}
    return {
        "level": _plain_integer(choice.level),
        "chunk": _plain_integer(choice.chunk),
        "reason": dict(itertools.islice(_reason(choice.reason), 20)),
    }


def _plain_integer(value: object) -> object:
    """Any integer as `int`, so that JSON has it; anything else as the session refuses it."""
    if value is None or isinstance(value, str | bool):
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return repr(value)[:200]


def _reason(reason: object) -> Iterator[tuple[str, float | str]]:
    """Numbers as numbers; the session drops the rest, and counts it."""
    for key, value in reason.items() if isinstance(reason, Mapping) else [("reason", "")]:
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        yield str(key)[:100], number if math.isfinite(number) else repr(value)[:100]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def main() -> None:
    """`python -m kvstream.testbed.lab.worker SPEC`: serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a policy prints must not mix with the answers
    limit()
    from kvstream.testbed.lab.submission import make

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
        except BaseException as error:  # report whatever the policy raises to the grader
            words = f"{type(error).__name__}: {error}"
            reply = json.dumps({"error": words[:500], "traceback": traceback.format_exc(limit=-3)[-2000:]})
        answers.write(reply + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
