"""Argument types shared by several commands; a wrong value is reported before anything runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstream.codec.profile import Profile


def output_file(text: str) -> Path:
    """A writable file: a result of minutes must not fail for want of a folder."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no folder {path.parent}; create it, or choose another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; choose another")
    return path


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def size(text: str) -> int:
    """Bytes with their unit."""
    from kvstream.traces.errors import TraceError
    from kvstream.traces.units import parse_size

    try:
        return parse_size(text)
    except TraceError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def port(text: str) -> int:
    """A port to listen on; 0 picks a free one."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give 0 to 65535")
    return int(text)


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    """`--profile` and `--force`, which `chosen_profile` reads."""
    parser.add_argument("--profile", metavar="FILE", help="a profile instead of the one calibrated here")
    parser.add_argument("--force", action="store_true", help="use the profile even if it is another model's")


def chosen_profile(args: argparse.Namespace) -> Profile | None:
    """The profile that was named, None for the calibrated one. Raises CodecError."""
    from kvstream.codec.profile import Profile

    return Profile.load(args.profile) if args.profile else None
