"""`kvstream`: the command line. Parses, dispatches, and turns every error into one line and an exit status.

Exit status: 0 ok, 1 a threshold was violated, 2 bad usage or input, 3 fidelity, 4 the machine lacks something,
70 internal error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

from kvstream.codec.errors import CodecError
from kvstream.policies.errors import PolicyError
from kvstream.testbed import terminal
from kvstream.testbed.errors import MachineError, SpecError, install
from kvstream.traces.errors import TraceError
from kvstream.traces.nearest import nearest

OK: Final = 0
VIOLATED: Final = 1
USAGE: Final = 2
FIDELITY: Final = 3
MACHINE: Final = 4
INTERNAL: Final = 70
INTERRUPTED: Final = 130

EXHAUSTED: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What the machine has no more of: not a fault of ours."""

GROUPS = (
    "kvstream.testbed.commands.experiments",
    "kvstream.testbed.commands.requests",
    "kvstream.testbed.commands.comparing",
    "kvstream.testbed.commands.traces",
    "kvstream.testbed.commands.codecs",
    "kvstream.testbed.commands.models",
    "kvstream.testbed.commands.policies",
    "kvstream.testbed.commands.serving",
    "kvstream.testbed.commands.advising",
    "kvstream.testbed.commands.showing",
    "kvstream.testbed.commands.dashboard",
    "kvstream.testbed.commands.lab",
    "kvstream.testbed.commands.completion",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise AssertionError  # exit does not return

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """An unknown option is reported where it was given, with the nearest that there is."""
        found, rest = super().parse_known_args(args, namespace)
        unknown = next((word.partition("=")[0] for word in rest if word.startswith("--")), None)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(f"unknown option {unknown}; {nearest(unknown, flags)}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """An unknown command gets the nearest that there is."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"unknown command {value!r}; {nearest(value, action.choices)}")
        super()._check_value(action, value)


class _Version(argparse.Action):
    """Looks the version up only when asked: that takes a tenth of the time of `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import kvstream

        print(f"kvstream {kvstream.__version__}")
        parser.exit(OK)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvstream",
        description="Stream LLM KV caches over emulated links and compare adaptation policies.",
        epilog="Run kvstream COMMAND --help for a command's options, kvstream doctor to check this machine.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in GROUPS:
        import_module(group).add_commands(subparsers)
    return parser


def split_program(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and the command line of the program that `trace replay` runs: what comes after `--`."""
    words = list(argv)
    at = words.index("--") if words[:2] == ["trace", "replay"] and "--" in words else len(words)
    return words[:at], words[at + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    terminal.prepare()
    words, program = split_program(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(words)
        args.program = program
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
        return _fail(MACHINE, f"package {error.name!r} is not installed; run: {install(error.name)}")
    except BrokenPipeError:
        # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if error.errno in EXHAUSTED:
            return _fail(
                MACHINE, f"{error.filename or os.getcwd()}: {(error.strerror or '').lower()}; make room and repeat"
            )
        if error.filename is None:  # not a path from the user
            return _internal(error)
        return _fail(USAGE, f"{error.filename}: {(error.strerror or 'unusable').lower()}; give another path")
    except MemoryError:
        return _fail(MACHINE, "out of memory; close other programs, or use shorter contexts or a smaller model")
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except Exception as error:
        return _internal(error)


def _internal(error: Exception) -> int:
    """The last resort: say what broke, and where only on request."""
    if os.environ.get("KVSTREAM_TRACEBACK"):
        raise error
    return _fail(INTERNAL, f"internal error: {type(error).__name__}: {error} (KVSTREAM_TRACEBACK=1 shows where)")


def _fail(status: int, message: object) -> int:
    terminal.say(f"kvstream: {message}", error=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
