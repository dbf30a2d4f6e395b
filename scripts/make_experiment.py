"""Write what is made from the keys of an experiment file: its page in docs/, its JSON schema, and the file that
`kvstream init` starts from.

    python scripts/make_experiment.py [--check]

`--check` writes nothing and exits with 1 if a file is out of date. Types and defaults come from the dataclasses,
meanings and examples from the text below each field.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
import textwrap
import tomllib
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvstream.testbed.config import type_check  # noqa: E402
from kvstream.testbed.config.experiment import Experiment  # noqa: E402
from kvstream.testbed.config.units import Scheme  # noqa: E402
from kvstream.testbed.emulator.fidelity import Limits  # noqa: E402

PAGE = ROOT / "docs" / "experiment.md"
SCHEMA = ROOT / "testbed" / "config" / "experiment.schema.json"
TEMPLATE = ROOT / "testbed" / "config" / "experiment.toml.template"
EXAMPLE = re.compile(r"\s*Example: `([^`]+)`\.")
WIDTH = 100


class Key(NamedTuple):
    """A key of the file; `example` is TOML."""

    name: str
    hint: Any
    text: str
    default: Any
    example: str

    @property
    def is_required(self) -> bool:
        return self.default is MISSING and self.name != "name"

    @property
    def type_words(self) -> str:
        if self.name == "schemes":
            return "tables"
        return type_check.words(plain(self.hint)).removeprefix("a ").removeprefix(" or ")

    @property
    def unit(self) -> str:
        if get_origin(self.hint) is Annotated and self.hint.__metadata__ == ("fraction",):
            return "share, 0 to 1"
        return "s" if self.name.endswith("_s") else "tokens" if self.name.endswith("_tokens") else ""

    @property
    def default_toml(self) -> str:
        if self.default is MISSING:
            return ""
        return "{}" if self.default is dict else json.dumps(self.default)


def keys(cls: type) -> list[Key]:
    """The fields of a dataclass, each with the text below it. Exits if a field has none."""
    module = ast.parse(Path(sys.modules[cls.__module__].__file__ or "").read_text(encoding="utf-8"))
    node = next(item for item in module.body if isinstance(item, ast.ClassDef) and item.name == cls.__name__)
    texts = {}
    for this, following in zip(node.body, node.body[1:], strict=False):
        if isinstance(this, ast.AnnAssign) and isinstance(this.target, ast.Name) and isinstance(following, ast.Expr):
            texts[this.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        if field.name not in texts:
            raise SystemExit(f"{cls.__name__}.{field.name} has no text below it: say what it is")
        text = texts[field.name]
        example = EXAMPLE.search(text)
        default = field.default_factory if field.default_factory is not MISSING else field.default
        found.append(Key(field.name, hints[field.name], EXAMPLE.sub("", text), default, example[1] if example else ""))
    return found


def plain(hint: Any) -> Any:
    return hint.__origin__ if get_origin(hint) is Annotated else hint


# --- the page


def page() -> str:
    parts = [
        "# The experiment file",
        "Generated from the code by `python scripts/make_experiment.py`. `kvstream init` writes such a file with a "
        "comment on every key; `kvstream run FILE` and `kvstream simulate FILE` take it, `--dry-run` checks it. It is "
        "[TOML](https://toml.io); the [JSON schema](../testbed/config/experiment.schema.json), which `kvstream init` "
        "puts beside the file, lets editors complete and check it.",
        "```toml file=small.toml\n" + SMALL + "```",
        "```console\n$ kvstream simulate small.toml --dry-run\nsmall: 2 units x 2 schemes = 4 sessions, ...\n...\n```",
        "Relative files of traces are looked for from the folder of the experiment, those of policies, codecs and "
        "contexts from the current one. Keys in bold must be given.",
        "## Keys",
        table(keys(Experiment)),
        "## Schemes",
        "One table `[[schemes]]` for each; every scheme runs on every unit.",
        table(keys(Scheme)),
        "## Fidelity limits",
        "In a table `[limits]`: what a session over an emulated link may deviate before it is repeated.",
        table(keys(Limits), example=False),
        "Settings of `links` are in [the emulated link](emulator.md#settings), traces in [traces](traces.md), policies "
        "and codecs with their settings in the [reference](reference.md#built-in-policies).",
    ]
    return "\n\n".join(parts) + "\n"


SMALL = """contexts = ["docs"]
traces = ["wifi,scale_mean=20Mbps"]
deadlines_s = [0.5, 1.0]

[[schemes]]
policy = "cachegen"
codec = "kvstream"

[[schemes]]
policy = "buffer-based"
codec = "kvstream"
"""


def table(entries: list[Key], example: bool = True) -> str:
    lines = ["| key | type | unit | default | |" + (" example |" if example else "")]
    lines.append("|---|---|---|---|---|" + ("---|" if example else ""))
    for key in entries:
        name = f"**`{key.name}`**" if key.is_required else f"`{key.name}`"
        default = f"`{key.default_toml}`" if key.default_toml else ""
        cells = [name, key.type_words, key.unit, default, key.text, *([f"`{key.example}`"] if key.example else [""])]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells[: 6 if example else 5]) + " |")
    return "\n".join(lines)


# --- the schema


def schema() -> str:
    scheme = {"type": "object", "additionalProperties": False, "required": ["policy", "codec"]}
    scheme["properties"] = {key.name: of_key(key) for key in keys(Scheme)}
    entries = keys(Experiment)
    properties = {key.name: of_key(key) for key in entries}
    limits = {key.name: {"type": "number", "minimum": 0, "description": key.text} for key in keys(Limits)}
    properties["limits"] |= {"properties": limits, "additionalProperties": False}
    properties["schemes"] = {
        "type": "array",
        "items": scheme,
        "minItems": 1,
        "description": next(key.text for key in entries if key.name == "schemes"),
    }
    body = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An experiment of kvstream",
        "type": "object",
        "additionalProperties": False,
        "required": [key.name for key in entries if key.is_required],
        "properties": properties,
    }
    return json.dumps(body, indent=1) + "\n"


def of_key(key: Key) -> dict[str, Any]:
    found: dict[str, Any] = of_hint(key.hint) | {"description": key.text}
    if key.is_required and found.get("type") == "array":
        found["minItems"] = 1
    if key.default is not MISSING:
        found["default"] = json.loads(key.default_toml)
    if key.example:
        found["examples"] = [example_of(key)]
    return found


def of_hint(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Annotated:
        return {"type": "number", "minimum": 0, "maximum": 1}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": of_hint(get_args(hint)[0])}
    simple = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": simple.get(hint, "object")}


def example_of(key: Key) -> Any:
    """The example as a value."""
    return tomllib.loads(f"x = {key.example}")["x"]


# --- the file to start from


def template() -> str:
    lines = [
        "#:schema ./experiment.schema.json",
        "# An experiment of kvstream. Check it with: kvstream simulate THIS_FILE --dry-run",
        "# Keys that are commented out have their defaults; the lines show other values.",
    ]
    for key in keys(Experiment):
        if key.name == "schemes":
            schemes = comment("What is compared: a table [[schemes]] for each; every one runs on every unit.")
        elif key.name != "is_quick":
            default = f" Default: {key.default_toml}." if key.default_toml else ""
            lines += ["", *comment(key.text + default)]
            lines.append(f"{'' if key.is_required else '# '}{key.name} = {key.example}")
    lines += ["", *schemes, "[[schemes]]"]
    for key in keys(Scheme):
        value = {"policy": '"cachegen"', "codec": '"kvstream"'}.get(key.name)
        lines += [*comment(key.text), f"{key.name} = {value}" if value else f"# {key.name} = {key.example}"]
    lines += ["", "[[schemes]]", 'policy = "buffer-based"', 'codec = "kvstream"']
    return "\n".join(lines) + "\n"


def comment(text: str) -> list[str]:
    return textwrap.wrap(text.replace("`", ""), WIDTH, initial_indent="# ", subsequent_indent="# ")


def main(arguments: list[str]) -> int:
    made = {PAGE: page(), SCHEMA: schema(), TEMPLATE: template()}
    stale = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is out of date; run: python scripts/make_experiment.py")
        return 1 if stale else 0
    for file in stale:
        file.write_text(made[file], encoding="utf-8")
        print(file.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
