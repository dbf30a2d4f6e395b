"""Reads Markdown pages: their code blocks, links and commands; and runs the blocks as a reader would.

The word after a fence's language says what a block is for:

    ```python                 run, after the blocks before it on the page
    ```console                each `$ kvstream ...` is run; its output must have the lines below it, `...` fits all
    ```python file=mine.py    written to that file (any language)
    ```console no-run WHY     only read: commands must exist
    ```console exit=2         the last command ends with that status

A command that ends with `&` goes on until the page ends; what it prints first must be there before the next one. All
blocks of a page share one folder and one Python namespace. PORT, where a page's sender listens, is a free one instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PORT = "8700"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
INLINE = re.compile(r"`(?P<code>(?:\./run_testbed\.sh|kvstream)(?: [^`]*)?)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    body: str
    no_run: str | None
    file: str | None
    status: int

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """The README and everything in docs, but for the generated reference."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page.is_file()]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        info = match["info"].strip()
        no_run = info.partition("no-run")[2].strip() if "no-run" in info else None
        settings = dict(word.split("=", 1) for word in info.partition("no-run")[0].split() if "=" in word)
        indent = match["indent"]
        body = "".join(line.removeprefix(indent) for line in match["body"].splitlines(keepends=True))
        yield Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            body,
            no_run,
            settings.get("file"),
            int(settings.get("exit", 0)),
        )


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.S)


def links(page: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(page)):
        yield match["target"] or match["image"]


def anchors(page: Path) -> set[str]:
    """What a `#...` may name on a page: its headings, as GitHub writes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?)\s*$", prose(page), re.M):
        text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


@dataclass
class Step:
    """A command of a console block, and what must come out."""

    command: str
    output: list[str]


def steps(block: Block) -> list[Step]:
    found: list[Step] = []
    continued = False
    for line in block.body.splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:], []))
        elif continued:
            found[-1].command += "\n" + line
        elif found:
            found[-1].output.append(line)
        continued = bool(found) and not found[-1].output and found[-1].command.endswith("\\")
    return found


def words(command: str) -> list[str]:
    """A command as a shell splits it, comments and a `&` at the end left out."""
    return shlex.split(command.replace("\\\n", " ").removesuffix("&"), comments=True)


def kvstream_arguments(command: str) -> list[str] | None:
    """Arguments of a `kvstream` call; None for anything else. run_testbed.sh passes its own on."""
    argv = words(command)
    if not argv or argv[0] not in ("kvstream", "./run_testbed.sh"):
        return None
    if argv[0] == "./run_testbed.sh":
        if argv[1:2] in (["test"], ["setup"]):
            return None
        return argv[1:] or ["run"]
    return argv[1:]


def mentioned_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every kvstream call in a page's prose."""
    for match in INLINE.finditer(prose(page)):
        code = match["code"].replace("\n", " ")
        argv = code.split()
        if argv[0] == "./run_testbed.sh" and argv[1:2] in (["test"], ["setup"], ["ARGS..."]):
            continue
        yield code, argv[1:]


class Reader:
    """Goes through one page in a folder of its own and does what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._background: list[subprocess.Popen[str]] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = str(free.getsockname()[1])

    def follow(self, page: Path) -> None:
        try:
            self._follow(page)
        finally:
            for process in self._background:
                process.terminate()
                process.communicate()

    def _follow(self, page: Path) -> None:
        for block in (replace(block, body=block.body.replace(PORT, self._port)) for block in blocks(page)):
            if block.file is not None:
                target = self.folder / block.file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.body, encoding="utf-8")
            elif block.no_run is None and block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(self.folder):
                    exec(compile(block.body, block.where, "exec"), self._names)
            elif block.no_run is None and block.language == "console":
                self._type_in(block)

    def _type_in(self, block: Block) -> None:
        todo = steps(block)
        for step in todo:
            if step.command.endswith("&"):
                self._begin(step, block)
                continue
            status, output = self._run(step.command)
            expected = block.status if step is todo[-1] else 0
            assert status == expected, f"{block.where}: `{step.command}` ended with {status}:\n{output}"
            missing = first_missing(step.output, output)
            assert missing is None, f"{block.where}: `{step.command}` does not print {missing!r} but:\n{output}"

    def _begin(self, step: Step, block: Block) -> None:
        """Start a command and read as many lines as the page shows of it, at least one."""
        argv = kvstream_arguments(step.command)
        assert argv is not None, f"{block.where}: only kvstream is run in the background"
        argv += ["--port", self._port] if argv[0] == "serve" else []
        command = [sys.executable, "-m", "kvstream.testbed.cli", *argv]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True, env=environment)
        self._background.append(process)
        assert process.stdout is not None
        output = "".join(process.stdout.readline() for _ in step.output or [""])
        missing = first_missing(step.output, output)
        assert missing is None, f"{block.where}: `{step.command}` does not print {missing!r} but:\n{output}"

    def _run(self, command: str) -> tuple[int, str]:
        from kvstream.testbed.cli import main

        argv = kvstream_arguments(command)
        if argv is None:
            first, *rest = words(command)
            assert first == "cd", f"{command!r}: only kvstream, ./run_testbed.sh and cd are run; mark the block no-run"
            self.folder /= rest[0]
            return 0, ""
        out = io.StringIO()
        before = sys.argv
        sys.argv = ["kvstream", *argv]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.chdir(self.folder):
                status = main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            sys.argv = before
        return status, out.getvalue()


def first_missing(expected: list[str], output: str) -> str | None:
    """The first expected line that the output does not have, in order; `...` stands for anything."""
    lines = iter(" ".join(line.split()) for line in output.splitlines())
    for wanted in expected:
        wanted = " ".join(wanted.split())
        if wanted in ("", "..."):
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.split("...")))
        if not any(pattern.fullmatch(line) for line in lines):
            return wanted
    return None
