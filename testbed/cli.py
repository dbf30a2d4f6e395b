"""`kvstream`: the command line. Parses, dispatches, and turns every error into one line and an exit status.

Exit status: 0 ok, 1 a bar was missed, 2 bad usage or input, 3 fidelity, 4 the machine lacks something,
70 internal error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from codec.errors import CodecError
from policies.errors import PolicyError
from testbed.errors import MachineError, SpecError
from traces.errors import TraceError

OK: Final = 0
MISSED: Final = 1
USAGE: Final = 2
FIDELITY: Final = 3
MACHINE: Final = 4
INTERNAL: Final = 70
INTERRUPTED: Final = 130

GROUPS = (
    "testbed.commands.experiments",
    "testbed.commands.traces",
    "testbed.commands.codecs",
    "testbed.commands.policies",
    "testbed.commands.serving",
    "testbed.commands.showing",
    "testbed.dashboard.cli",
    "testbed.lab.cli",
    "testbed.commands.completion",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line instead of the whole usage."""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvstream",
        description="Stream LLM KV caches over emulated links and compare adaptation policies.",
        epilog="kvstream COMMAND --help says more; kvstream doctor says what this machine can do.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in GROUPS:
        import_module(group).add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (SpecError, TraceError, CodecError, PolicyError) as error:
        return _fail(USAGE, error)
    except MachineError as error:
        return _fail(MACHINE, error)
    except FileNotFoundError as error:
        return _fail(USAGE, f"{error.filename}: no such file; check the path")
    except PermissionError as error:
        return _fail(MACHINE, f"{error.filename}: no permission; run as its owner or choose another path")
    except ModuleNotFoundError as error:
        return _fail(MACHINE, f"package {error.name!r} is not installed; run: pip install 'kvstream[run]'")
    except BrokenPipeError:
        # the reader of our output (head, less) has gone: nothing is left to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if error.filename is None:  # not a path that somebody gave
            return _internal(error)
        return _fail(USAGE, f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; give another path")
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except Exception as error:
        return _internal(error)


def _internal(error: Exception) -> int:
    """The last resort: say what broke, show where only when asked."""
    if os.environ.get("KVSTREAM_TRACEBACK"):
        raise error
    return _fail(INTERNAL, f"internal error: {type(error).__name__}: {error} (KVSTREAM_TRACEBACK=1 shows where)")


def _fail(status: int, message: object) -> int:
    print(f"kvstream: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
