"""A policy or a codec from a file is first tried in a process of its own: what never ends there, or ends its process,
is one line here instead of a command that hangs, or that ends with a status that means something else."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from kvstream.codec import registry
from kvstream.codec.errors import CodecError
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config import specs
from kvstream.testbed.config.build import codec_spec, make_policy
from kvstream.testbed.host.namespaces import PR_SET_CHILD_SUBREAPER, die_with_parent, libc
from kvstream.testbed.host.process import IMPORT_ROOT
from kvstream.testbed.session.ask import IMPORT_S, PATIENCE_S, TimedAsk, give_forecast

TRIAL_S: Final = 60.0
"""For importing the file and all that it imports, and what comes first: a choice, or a small chunk at every level."""
MEMORY_BYTES: Final = 8 << 30
"""Of addresses, of which some packages take several GiB when they are imported."""
TRIED: Final = "tried"
LATE: Final = "late"


def try_policy(text: str) -> None:
    """Raise PolicyError for a policy from a file that does not get through a first choice, whatever it raises there."""
    problem = _problem("policy", text, "first choice")
    if problem:
        raise PolicyError(problem)


def try_codec(text: str) -> None:
    """Raise CodecError for a codec from a file that does not get through a first chunk, whatever it raises there."""
    problem = _problem("codec", text, "first chunk")
    if problem:
        raise CodecError(problem)


def _problem(what: str, text: str, first: str) -> str:
    """What keeps a policy or a codec from getting that far; empty if nothing does, or if it is not from a file."""
    if ".py:" not in specs.parse(text, what).name:
        return ""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(IMPORT_ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "kvstream.testbed.simulator.trial", what, text, str(TRIAL_S)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, check=False,
    )  # fmt: skip
    ended = done.stdout.decode().strip()
    if ended == LATE:
        return (
            f"{what} {text} does not get to its {first} within {TRIAL_S:g} s; "
            "look for a loop without end in the file or the constructor"
        )
    if ended != TRIED:
        return f"{what} {text} ends its process ({ended}) before its {first}; it must return or raise"
    return ""


def main(what: str, text: str, limit_s: float) -> None:
    """Try in a child, and say how that ended. Nothing that the child starts outlives this."""
    die_with_parent()
    libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whatever loses its parent below becomes a child of this process
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _try(what, text, write_end)
    os.close(write_end)
    ready, _, _ = select.select([read_end], [], [], limit_s)
    ended = LATE
    if ready and os.read(read_end, 1):
        ended = TRIED
    elif ready:  # closed without a word
        ended = ""
    with suppress(ChildProcessError):
        if not ended:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended = f"status {code}" if code >= 0 else signal.Signals(-code).name
        while True:
            for one in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(one), signal.SIGKILL)
            os.wait()
    print(ended)


def _try(what: str, text: str, answer: int) -> NoReturn:
    """What is raised here comes again where the policy or codec is used, and is reported there."""
    os.set_inheritable(answer, False)
    os.dup2(2, 1)  # what it prints is no answer
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    with suppress(BaseException):
        _first_choice(text) if what == "policy" else _first_chunk(text)
    os.write(answer, b"1")
    os._exit(0)  # threads that may have been started must not keep it


def _first_choice(text: str) -> None:
    from kvstream.testbed.simulator.policy_check import first_situation, forecast

    policy = make_policy(text)
    give_forecast(policy, forecast())
    TimedAsk(PATIENCE_S, import_s=IMPORT_S).choose(policy, first_situation())  # a loop there costs a session only


def _first_chunk(text: str) -> None:
    """A small chunk at every level, there and back; a codec that needs a profile is only imported."""
    name, settings = codec_spec(text)
    if registry.codec_class(name).needs_profile:
        return
    import torch

    codec = registry.make(name, settings)
    kv = torch.randn(2, 2, 32, 2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    for level in range(len(codec.levels)):
        codec.decode(codec.encode(kv, level, positions=range(32)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
