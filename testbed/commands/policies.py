"""`kvstream policy ...`: list, write and check adaptation policies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvstream.testbed.terminal import GREEN, RED, coloured, say


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    policy = subparsers.add_parser("policy", help="list, write and check adaptation policies")
    commands = policy.add_subparsers(dest="policy_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="list all policies and their settings")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    new = commands.add_parser("new", help="write a template for a policy")
    new.add_argument("name", help="name of the policy, words joined by dashes: my-policy")
    new.add_argument("--json", action="store_true", help="print as JSON")
    new.set_defaults(run=new_command)

    check = commands.add_parser("check", help="check a policy against the contract")
    check.add_argument("policy", help="./mine.py, ./mine.py:MyPolicy or a name, with settings")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(run=check_command)


def list_command(args: argparse.Namespace) -> int:
    import dataclasses
    import inspect

    from kvstream.policies import registry
    from kvstream.policies.errors import PolicyError
    from kvstream.testbed.results.words import CLAIRVOYANT

    entries: list[dict[str, Any]] = []
    for name in registry.names():
        try:
            cls = registry.policy_class(name)
        except PolicyError as error:  # a plug-in; the others work
            entries.append({"name": name, "problem": str(error)})
            continue
        values = registry.settings(name)
        entries.append(
            {
                "name": name,
                "clairvoyant": registry.is_clairvoyant(cls),
                "about": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
                "settings": {k: "required" if v is dataclasses.MISSING else v for k, v in values.items()},
            }
        )
    if args.json:
        print(json.dumps(entries, indent=1, default=str))
        return 0
    for entry in entries:
        if "problem" in entry:
            say(f"{entry['name']}\n    does not work: {entry['problem']}")
            continue
        settings = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
        say(f"{entry['name']}{' *' if entry['clairvoyant'] else ''}  {settings}\n    {entry['about']}")
    say(f"* {CLAIRVOYANT}")
    return 0


def new_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.simulator import policy_check

    path = policy_check.write_template(args.name, Path.cwd())
    spec = f"./{path.name}:{policy_check.class_name(args.name)}"
    if args.json:
        print(json.dumps({"file": str(path), "policy": spec}, indent=1))
    else:
        say(f"{path} written; check it with: kvstream policy check {spec}")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.config.build import make_policy
    from kvstream.testbed.lab.submission import spec_of
    from kvstream.testbed.simulator import policy_check
    from kvstream.testbed.simulator.trial import try_policy

    policy = spec_of(args.policy)
    try_policy(policy)
    make_policy(policy)  # a missing file or class is one error, not one per check
    findings = policy_check.check(lambda: make_policy(policy))
    if args.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = coloured("ok  ", GREEN) if finding.ok else coloured("FAIL", RED)
            say(f"{mark} {finding.name}{'' if finding.ok else ': ' + finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1
