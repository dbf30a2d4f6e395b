"""Write docs/reference.md from the code: commands from their parsers, public names from their docstrings.

    python scripts/make_reference.py [--check]

`--check` writes nothing and exits with 1 if the page is out of date. The sources are parsed, not imported, so
neither torch nor numba is needed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "reference.md"
ROOMS = {"traces": "Traces", "codec": "Codecs", "policies": "Policies", "testbed": "Testbed"}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def page() -> str:
    """The whole page; the same code gives the same text."""
    parts = [
        "# Reference",
        "Generated from the code by `python scripts/make_reference.py`. Units are part of the names: `_s` seconds, "
        "`_bytes`, `_bps` bits per second.",
        "[Commands](#commands) · [Public names](#public-names) · [Policies](#built-in-policies) · "
        "[Estimators](#throughput-estimators) · [Codecs](#built-in-codecs) · "
        "[Generators](#trace-generators)",
        *commands(),
        *public_names(),
        *policies(),
        *estimators(),
        *codecs(),
        *generators(),
    ]
    return "\n\n".join(parts) + "\n"


# --- commands


def commands() -> Iterator[str]:
    from kvstream.testbed.cli import build_parser
    from kvstream.testbed.commands.completion import children, parsers

    yield "## Commands"
    yield (
        "Exit status of every command: 0 ok, 1 a threshold was violated or a check failed, 2 bad usage or input, 3 the "
        "emulated link deviated from its trace, 4 the machine lacks something, 70 internal error, 130 interrupted."
    )
    about = helps(build_parser())
    for path, parser in parsers(build_parser()):
        if path and not children(parser):
            yield command(path, parser, about[path])


def helps(parser: argparse.ArgumentParser, path: str = "") -> dict[str, str]:
    """The one-line help of every subcommand, by the words that lead to it."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                found[f"{path}/{choice.dest}"] = choice.help or ""
            for name, child in action.choices.items():
                found |= helps(child, f"{path}/{name}")
    return found


def command(path: str, parser: argparse.ArgumentParser, about: str) -> str:
    arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    positional = [_placeholder(action) for action in arguments if not action.option_strings]
    title = " ".join(["kvstream", *path.strip("/").split("/"), *positional])
    lines = [f"### `{title}`", "", sentence(parser.description or about)]
    rows = [
        (_flag(action), (action.help or "").replace("%%", "%").replace("|", r"\|"))
        for action in arguments
        if action.option_strings or action.help
    ]
    if rows:
        lines += ["", "| | |", "|---|---|", *(f"| `{flag}` | {text} |" for flag, text in rows)]
    return "\n".join(lines)


def _placeholder(action: argparse.Action) -> str:
    if action.choices:
        word = "|".join(str(choice) for choice in action.choices)
    else:
        word = _name(action)
    if action.nargs == "?":
        return f"[{word}]"
    if action.nargs == 2:
        return f"{word} {word}"
    return f"{word}..." if action.nargs in ("+", "*") else word


def _flag(action: argparse.Action) -> str:
    if not action.option_strings:
        return _placeholder(action).replace("|", r"\|")
    flag = action.option_strings[-1]
    return flag if action.nargs == 0 else f"{flag} {_name(action)}"


def _name(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


# --- names


def public_names() -> Iterator[str]:
    import kvstream

    yield "## Public names"
    yield "All of these come from `import kvstream`, which loads each part when it is first used."
    by_room: dict[str, list[tuple[str, str, str]]] = {room: [] for room in ROOMS}
    for name, place in kvstream._NAMES.items():
        module, _, attribute = place.partition(":")
        by_room[module.partition(".")[0]].append((name, module, attribute or name))
    for room, entries in by_room.items():
        yield f"### {ROOMS[room]}"
        for name, module, attribute in sorted(entries, key=lambda entry: entry[0].lower()):
            yield entry(name, module, attribute)


def entry(name: str, module: str, attribute: str) -> str:
    """One public name: signature, docstring, and for classes their fields and methods."""
    node = definition(module, attribute)
    if isinstance(node, ast.ClassDef):
        shown = name + (f"({ast.unparse(node.bases[0])})" if node.bases else "")
        lines = [f"#### `{shown}`", "", doc(node)]
        members = [*fields(node), *methods(node)]
        return "\n".join([*lines, "", *members] if members else lines)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"#### `{signature(node, name)}`\n\n{doc(node)}"
    return f"#### `{name}`\n\n{doc(node)}"


def fields(node: ast.ClassDef) -> Iterator[str]:
    """Public annotated attributes with the text below them."""
    for this, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(this, ast.AnnAssign) or not isinstance(this.target, ast.Name):
            continue
        if this.target.id.startswith("_") or "ClassVar" in ast.unparse(this.annotation):
            continue
        default = "" if this.value is None or "field(" in ast.unparse(this.value) else f" = {ast.unparse(this.value)}"
        text = f": {first_paragraph(text_of(following))}" if following and is_text(following) else ""
        yield f"- `{this.target.id}: {ast.unparse(this.annotation)}{default}`{text}"


def methods(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if not isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) or item.name.startswith("_"):
            continue
        marks = {ast.unparse(mark) for mark in item.decorator_list}
        text = ast.get_docstring(item)
        if marks & {"overload", "typing.overload"} or (text is None and "property" not in marks):
            continue
        shown = item.name if "property" in marks else signature(item, item.name)
        yield f"- `{shown}`" + (f": {first_paragraph(text)}" if text else "")


# --- what comes with kvstream


def policies() -> Iterator[str]:
    from kvstream.policies import registry

    yield "## Built-in policies"
    yield "`--policy name,setting=value`. Those marked * are clairvoyant: they see the future trace and are bounds."
    for name, place in sorted(registry.POLICIES.items()):
        module, _, attribute = place.partition(":")
        node = definition(module, attribute)
        mark = " *" if registry.is_clairvoyant(registry.policy_class(name)) else ""
        lines = [f"#### `{name}`{mark}", "", first_paragraph(ast.get_docstring(tree(module)) or "") + " " + doc(node)]
        settings = settings_of(node, module)
        yield "\n".join([*lines, "", *settings] if settings else lines)


def settings_of(node: ast.AST, module: str) -> list[str]:
    """Fields of a policy's class, those of its base in the same module first."""
    if not isinstance(node, ast.ClassDef):
        return []
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    inherited = [line for base in bases for line in settings_of(definition(module, base), module)]
    return inherited + list(fields(node))


def estimators() -> Iterator[str]:
    yield "## Throughput estimators"
    yield "Pure functions in `kvstream.policies.estimators`; rates in bit/s, oldest first."
    yield "\n".join(functions("kvstream.policies.estimators"))


def codecs() -> Iterator[str]:
    from kvstream.codec import registry

    yield "## Built-in codecs"
    yield "`--codec name,setting=value`."
    for name, place in sorted(registry.CODECS.items()):
        module, _, attribute = place.partition(":")
        node = definition(module, attribute)
        init = [item for item in getattr(node, "body", []) if getattr(item, "name", "") == "__init__"]
        shown = signature(init[0], name).replace("(self, ", "(").replace("(self)", "()") if init else name
        text = first_paragraph(ast.get_docstring(tree(module)) or "")
        yield f"#### `{shown.removesuffix(' -> None')}`\n\n{text} {doc(node)}"


def generators() -> Iterator[str]:
    yield "## Trace generators"
    yield "`--trace name,setting=value`; see [traces](traces.md) for the transforms that go with any trace."
    yield "\n".join(functions("kvstream.traces.generators", decorated="generator"))


def functions(module: str, decorated: str = "") -> Iterator[str]:
    for node in tree(module).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if decorated and decorated not in {ast.unparse(mark) for mark in node.decorator_list}:
            continue
        name = node.name.rstrip("_").replace("_", "-") if decorated else node.name
        yield f"- `{signature(node, name)}`: {first_paragraph(ast.get_docstring(node) or '')}"


# --- from source


@cache
def tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def definition(module: str, name: str) -> ast.AST:
    """The class, function or constant of a name; for a constant, the text below it or an empty one."""
    body = tree(module).body
    for this, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(this, Definition) and this.name == name:
            return this
        target = this.target if isinstance(this, ast.AnnAssign) else getattr(this, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == name:
            return following if is_text(following) and following else ast.Expr(ast.Constant(f"`{ast.unparse(this)}`"))
        if isinstance(this, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in this.names):
            return definition(this.module or "", name)
    raise SystemExit(f"{module} has no {name}")


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def text_of(node: ast.AST) -> str:
    """The text of a bare string statement."""
    return str(ast.literal_eval(node.value)) if isinstance(node, ast.Expr) else ""


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    arguments = ast.unparse(node.args)
    bound = "self, " if arguments.startswith("self, ") else "cls, " if arguments.startswith("cls, ") else ""
    arguments = "" if arguments in ("self", "cls") else arguments.removeprefix(bound)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({arguments}){result}"


def doc(node: ast.AST) -> str:
    """The docstring, as it stands."""
    if is_text(node):
        return inspect.cleandoc(text_of(node))
    return ast.get_docstring(node) or "" if isinstance(node, Definition) else ""


def first_paragraph(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def main(arguments: list[str]) -> int:
    text = page()
    if arguments == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE.relative_to(ROOT)} is out of date; run: python scripts/make_reference.py")
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
