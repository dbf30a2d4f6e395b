"""`kvstream completion`: a shell's completion script, generated from the parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

SHELLS = ("bash", "zsh")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    completion = subparsers.add_parser(
        "completion",
        help="print a shell's completion script",
        description='Print a completion script. For this shell: eval "$(kvstream completion bash)"; to keep it, add '
        "that line to ~/.bashrc (or, with zsh, to ~/.zshrc).",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=completion_command)


def completion_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.cli import build_parser

    print(script(build_parser(), args.shell, names()))
    return 0


def names() -> dict[str, list[str]]:
    """Values of options and positionals by their name: models, policies, codecs, traces."""
    from kvstream.codec import registry as codecs
    from kvstream.policies import registry as policies
    from kvstream.testbed.models import catalogue
    from kvstream.traces import generators, library

    return {
        "model": [catalogue.BUNDLED, *catalogue.MODELS],
        "policy": policies.names(),
        "codec": codecs.names(),
        "trace": sorted({*library.names(), *generators.GENERATORS}),
    }


def parsers(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser under `parser` with its command path: `("", top)`, `("/trace/list", ...)`."""
    yield path, parser
    for name, child in children(parser).items():
        yield from parsers(child, f"{path}/{name}")


def children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def script(parser: argparse.ArgumentParser, shell: str, known: dict[str, list[str]]) -> str:
    """The completion script: the words that can follow each command, files where there are none."""
    cases, values = [], []
    for path, command in parsers(parser):
        words = [*children(command), *(flag for action in command._actions for flag in action.option_strings)]
        positional = [action for action in command._actions if not action.option_strings]
        words += [word for action in positional for word in known.get(action.dest, [])]
        words += [str(c) for a in positional if isinstance(a.choices, tuple | list) for c in a.choices]
        cases.append(f"    {shlex.quote(path)}) words={shlex.quote(' '.join(words))} ;;")
    for option, words in known.items():
        values.append(f"    --{option}) words={shlex.quote(' '.join(words))} ;;")
    known_paths = "|".join(shlex.quote(path) for path, _ in parsers(parser) if path)
    zsh = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return zsh + _TEMPLATE.format(paths=known_paths, cases="\n".join(cases), values="\n".join(values))


_TEMPLATE = """\
_kvstream() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} path= words= word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case $path/$word in
    {paths}) path=$path/$word ;;
    esac
  done
  case $previous in
{values}
    *) case $path in
{cases}
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _kvstream kvstream"""
