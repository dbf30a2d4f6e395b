"""The documentation does what it says: blocks run, links lead somewhere, commands and generated pages are current."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from kvstream.testbed.cli import build_parser, split_program
from kvstream.testbed.commands.completion import children
from tests import pages
from tests.pages import ROOT, Block, Reader
from tests.testbed.made_run import make_run

PAGES = pages.pages()
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def every_block() -> list[Block]:
    return [block for page in PAGES for block in pages.blocks(page)]


def script(name: str) -> ModuleType:
    """A program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs_something(page: Path) -> bool:
    return any(block.no_run is None and block.language in ("python", "console") for block in pages.blocks(page))


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if runs_something(page)])
def test_code_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(str(tmp_path))
    Reader(tmp_path).follow(ROOT / name)


def test_there_is_something_to_run():
    ran = [block for block in every_block() if block.no_run is None and block.language in ("python", "console")]
    assert len(ran) > 20


@pytest.mark.parametrize("block", [b for b in every_block() if b.no_run is not None], ids=lambda b: b.where)
def test_blocks_that_are_not_run_say_why_and_could_be(block):
    assert block.no_run, f"{block.where}: say after no-run why"
    if block.language == "python":
        compile(block.body, block.where, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name):
    page = ROOT / name
    for block in pages.blocks(page):
        if block.language == "console" and not block.status:
            for step in pages.steps(block):
                check_parses(step.command, block.where)
    for code, argv in pages.mentioned_commands(page):
        check_words(argv, f"{name}: `{code}`")


def check_parses(command: str, where: str) -> None:
    argv = pages.kvstream_arguments(command)
    if argv is not None:
        status: object = None
        try:
            build_parser().parse_args(split_program(argv)[0])
        except SystemExit as stop:
            status = stop.code
        assert not status, f"{where}: `{command}` cannot be parsed"


def check_words(argv: list[str], where: str) -> None:
    """Commands and options of a call in prose, whose arguments may be placeholders."""
    parser: argparse.ArgumentParser = build_parser()
    for word in split_program(argv)[0]:
        below = children(parser)
        if word.startswith("--"):
            flags = {flag for action in parser._actions for flag in action.option_strings}
            assert word.partition("=")[0].rstrip(",") in flags, f"{where}: {parser.prog} has no option {word}"
        elif below and re.fullmatch(r"[a-z]+", word):
            assert word in below, f"{where}: {parser.prog} has no command {word!r}"
            parser = below[word]


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    page = ROOT / name
    for target in pages.links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target} leads nowhere"
        if anchor and file.suffix == ".md":
            assert anchor in pages.anchors(file), f"{name}: {target}: no such heading"


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in pages.links(index)}
    missing = [name for name, page in zip(NAMES, PAGES, strict=True) if page not in linked and page != index]
    assert [name for name in missing if "/solutions/" not in name] == []


def test_every_page_is_in_the_sites_menu():
    menu = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(menu) == sorted({*NAMES, *(path for path in menu if not path.startswith("docs/"))})
    assert all((ROOT / path).is_file() for path in menu)


@pytest.mark.parametrize(
    "generator",
    ["make_reference", "make_experiment", "draw_architecture", "codec_results", "scale_results", "engine_results"],
)
def test_generated_files_are_current(generator, capsys):
    assert script(generator).main(["--check"]) == 0, capsys.readouterr().out


class TestFacts:
    """What pages list is what the code has."""

    def text(self, name: str) -> str:
        return (ROOT / "docs" / name).read_text(encoding="utf-8")

    def test_routes_of_the_sender(self, tmp_path):
        from kvstream.testbed.net.sender import Sender
        from kvstream.testbed.store.store import Store

        routes = Sender(Store(tmp_path)).app().router.routes()
        served = {(route.method, route.resource.canonical) for route in routes if route.resource is not None}
        served = {(method, path) for method, path in served if method != "HEAD"}
        names = {"{id}": "{context}", "{i}": "{chunk}"}
        rows = re.findall(r"^\| `(GET|PUT) (\S+)`", self.text("http-api.md"), re.M)
        listed = {(method, re.sub(r"\{id\}|\{i\}", lambda m: names[m[0]], path)) for method, path in rows}
        assert listed == served

    def test_schema_of_the_manifest(self):
        from kvstream.testbed.store import manifest
        from kvstream.testbed.workloads import precomputed

        schema = json.loads(self.text("manifest.schema.json"))["properties"]
        offer = precomputed.load("docs", "cachegen")
        assert offer is not None
        body = offer.manifest.to_json()
        assert set(body) == set(schema)
        assert set(body["kv"]) == set(schema["kv"]["properties"])
        assert set(body["codec"]) == set(schema["codec"]["properties"])
        assert set(body["levels"][0]) == set(schema["levels"]["items"]["properties"])
        assert len(body["chunks"][0]) == len(schema["chunks"]["items"]["prefixItems"])
        assert schema["format"]["const"] == manifest.FORMAT
        assert schema["levels"]["maxItems"] == manifest.MAX_LEVELS
        assert schema["chunks"]["maxItems"] == manifest.MAX_CHUNKS

    def test_every_check_of_doctor_is_explained(self):
        from kvstream.testbed.emulator import doctor

        source = (ROOT / "testbed" / "emulator" / "doctor.py").read_text(encoding="utf-8")
        names = set(re.findall(r'(?:Check|_try)\(\s*"([^"]+)"', source)) | {*doctor.PROGRAMS, *doctor.PACKAGES}
        rows = [
            line.split("|")[1] for line in self.text("howto/troubleshooting.md").splitlines() if line.startswith("|")
        ]
        explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
        assert len(names) > 15
        assert {name for name in names if name not in explained and name not in ", ".join(explained)} == set()

    def test_metrics_of_thresholds(self):
        from kvstream.testbed.results.thresholds import METRICS

        assert [name for name in METRICS if f"`{name}`" not in self.text("howto/ci.md")] == []

    def test_number_of_trace_formats(self):
        from kvstream.traces.formats import FORMATS

        assert len(FORMATS) == 18, "README, own-trace.md and CHANGELOG.md say eighteen"


def test_files_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:codec|policies|testbed|traces|tests|scripts)/[\w./]*)`", text)
    assert len(named) > 40
    assert sorted({name for name in named if "NAME" not in name and not (ROOT / name).exists()}) == []


class TestPaper:
    TEXT = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")

    def test_tables_are_what_was_measured(self):
        results = script("paper_results")
        kept = json.loads(results.KEPT.read_text(encoding="utf-8"))
        assert results.replaced(self.TEXT, results.blocks(kept)) == self.TEXT, "run: python scripts/paper_results.py"

    def test_the_claim_holds_in_the_paper_s_form(self):
        kept = json.loads(script("paper_results").KEPT.read_text(encoding="utf-8"))["paper_slo"]
        [entry] = [entry for entry in kept["settings"] if entry["deadline_s"] == 1.0]
        missed = {name: scheme["violations"] for name, scheme in entry["schemes"].items()}
        assert entry["n"] >= 2000
        assert 0.80 <= missed["8-bit"] <= 0.95
        assert missed["cachegen"] <= missed["8-bit"] / 4
        assert missed["ours"] < missed["cachegen"]
        assert missed["our-oracle"] <= missed["ours"]


class TestReadme:
    TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_is_short(self):
        assert len(self.TEXT.splitlines()) < 200

    def test_result_is_what_was_measured(self):
        results = script("readme_results")
        if not results.KEPT.is_file():
            pytest.skip("no result of the main job is kept in benchmarks/results yet")
        block = results.block(json.loads(results.KEPT.read_text(encoding="utf-8")))
        assert results.replaced(self.TEXT, block) == self.TEXT, "run: python scripts/readme_results.py"

    def test_result_of_a_run_goes_in(self, tmp_path):
        results = script("readme_results")
        run = make_run(tmp_path / "run")
        from kvstream.testbed.results.summary import summarise

        manifest = run.manifest | {"git": "0123456", "processor": "a processor", "cores": 2}
        (run.path / "manifest.json").write_text(json.dumps(manifest))
        (run.path / "summary.json").write_text(json.dumps(summarise(run.rows(), baseline="fixed-highest")))
        readme = results.replaced(self.TEXT, results.block(results.kept(run.path)))
        assert "| buffer-based |" in readme
        assert results.replaced(readme, results.block(results.kept(run.path))) == readme


class TestReading:
    """The reader itself must notice what is wrong."""

    def test_missing_output_is_noticed(self):
        assert pages.first_missing(["level ... of 4"], "a\nlevel 3  of 4\n") is None
        assert pages.first_missing(["b", "a"], "a\nb\n") == "a"

    def test_unknown_commands_are_noticed(self):
        with pytest.raises(AssertionError, match="no command"):
            check_words(["trace", "paint"], "here")
        with pytest.raises(AssertionError, match="no option"):
            check_words(["trace", "show", "--colour"], "here")
        with pytest.raises(AssertionError, match="cannot be parsed"):
            check_parses("kvstream trace show", "here")
