"""`kvstream policy ...`: list, write and check adaptation policies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    policy = subparsers.add_parser("policy", help="list, write and check adaptation policies")
    commands = policy.add_subparsers(dest="policy_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="every policy and its settings")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    new = commands.add_parser("new", help="write a policy file to start from")
    new.add_argument("name", help="name of the policy, in words joined by dashes: my-policy")
    new.add_argument("--json", action="store_true", help="print as JSON")
    new.set_defaults(run=new_command)

    check = commands.add_parser("check", help="run the contract's checks on a policy")
    check.add_argument("policy", help="./mine.py:MyPolicy or a name, with settings")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(run=check_command)


def list_command(args: argparse.Namespace) -> int:
    import dataclasses
    import inspect

    from policies import registry

    entries: list[dict[str, Any]] = []
    for name in registry.names():
        cls = registry.policy_class(name)
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
        settings = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
        print(f"{entry['name']}{' *' if entry['clairvoyant'] else ''}  {settings}\n    {entry['about']}")
    print("* is told the future of the link")
    return 0


def new_command(args: argparse.Namespace) -> int:
    from testbed import policy_check

    path = policy_check.write_template(args.name, Path.cwd())
    spec = f"./{path.name}:{policy_check.class_name(args.name)}"
    if args.json:
        print(json.dumps({"file": str(path), "policy": spec}, indent=1))
    else:
        print(f"{path} written; check it with: kvstream policy check {spec}")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from testbed import policy_check
    from testbed.plugs import make_policy

    make_policy(args.policy)  # a file or class that is not there is one error, not one a check
    findings = policy_check.check(lambda: make_policy(args.policy))
    if args.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}{'' if finding.ok else ': ' + finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1
