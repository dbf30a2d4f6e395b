"""`kvstream codec ...`: encode, decode, inspect, calibrate, measure."""

from __future__ import annotations

import argparse


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    subparsers.add_parser("codec", help="encode, decode, inspect and measure codecs")
