"""`kvstream store`, `serve` and `fetch` fit together, by names that people gave; caches go in and out as files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvstream.testbed.cli import main
from kvstream.testbed.engine.model import Model
from kvstream.testbed.store.kv_file import read_kv_file
from kvstream.testbed.store.names import find_id, names_of, shortest_name
from kvstream.testbed.store.store import Store

CONTEXT = {"name": "short", "text": "line red-fox: REGISTER is <12345>\n" * 20, "questions": []}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("short.json").write_text(json.dumps(CONTEXT))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0, capsys.readouterr()
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@contextmanager
def serving(*argv: str) -> Iterator[list[str]]:
    """The lines that `kvstream serve` prints before it listens for good."""
    command = [sys.executable, "-m", "kvstream.testbed.cli", "serve", *argv, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while "--json" not in argv and lines[-1] and not lines[-1].startswith("fetch one"):
            lines.append(process.stdout.readline())
        yield lines
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_the_default_store_needs_no_folder(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tiny_model: Model
) -> None:
    assert "nothing is stored yet: run kvstream store docs" in refused(capsys, "serve")
    model = ("--model", str(tiny_folder))
    said = printed(capsys, "store", "./short.json", "--codec", "uniform", *model)
    assert said.splitlines()[-1] == "serve it: kvstream serve"
    with serving() as lines:
        assert lines[0].startswith("serving 1 context of ")
        url = lines[0].split()[-1]
        assert "short-uniform-" in lines[1]
        assert lines[-1] == f"fetch one: kvstream fetch {url} short\n"
        printed(capsys, "fetch", url, "short", "--output", "first.safetensors", "--policy", "fixed,level=highest")
        again = json.loads(printed(capsys, "fetch", url, "short", "--output", "second.safetensors", "--json"))
    assert again["met"] in (True, False)
    kept = read_kv_file(Path("first.safetensors"))
    assert kept.kv.shape == tuple(again["shape"])
    assert kept.token_ids == tiny_model.encode(str(CONTEXT["text"]))


def test_a_store_by_its_folder(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    model = ("--model", str(tiny_folder))
    said = json.loads(printed(capsys, "store", "./short.json", "--codec", "raw", *model, "--to", "mine", "--json"))
    assert said["store"] == "mine"
    assert Store("mine", create=False).contexts() == [said["contexts"][0]["id"]]
    assert not Path("cache/kvstream/store-v3").exists()
    with serving("mine", "--json") as lines:
        assert json.loads(lines[0])["contexts"] == 1


def test_a_cache_goes_out_and_in_again(capsys: pytest.CaptureFixture[str]) -> None:
    kv = torch.randn(2, 2, 70, 3, 8, dtype=torch.float32).to(torch.bfloat16)
    ids = torch.randint(0, 70_000, (70,), dtype=torch.int32)
    save_file({"kv": kv, "token_ids": ids}, "from elsewhere.safetensors", metadata={"model": "ab" * 32})
    out = json.loads(
        printed(capsys, "store", "--kv", "from elsewhere.safetensors", "--codec", "raw", "--codec", "uniform", "--json")
    )
    raw, uniform = (row["id"] for row in out["contexts"])
    assert (raw[:19], uniform[:22]) == ("from-elsewhere-raw-", "from-elsewhere-uniform")
    levels = Store(out["store"], create=False).manifest(uniform).levels
    errors = [level.distortion for level in levels]
    assert errors == sorted(errors, reverse=True)  # relative squared errors: nothing was measured for this model
    assert 0 < errors[-1] < errors[0] < 1
    with serving("--json") as lines:
        url = f"http://127.0.0.1:{json.loads(lines[0])['port']}"
        printed(capsys, "fetch", url, raw, "--output", "arrived.safetensors")
    with safe_open("arrived.safetensors", "pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_tensor("kv"), kv)
        assert file.get_tensor("token_ids").tolist() == ids.tolist()
    assert (metadata["model"], metadata["context"], metadata["distortion"]) == ("ab" * 32, raw, "0")
    again = json.loads(printed(capsys, "store", "--kv", "arrived.safetensors", "--codec", "raw", "--json"))
    assert again["contexts"][0]["id"].startswith("arrived-raw-")


def test_the_model_of_a_cache_may_be_named(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    from kvstream.testbed.engine.loading import fingerprint

    save_file({"kv": torch.zeros(3, 2, 4, 2, 16), "token_ids": torch.arange(4)}, "kv.safetensors")
    call = ("store", "--kv", "kv.safetensors", "--codec", "raw")
    assert "does not say which model its cache is of; give it with --model FOLDER" in refused(capsys, *call)
    for model, expected in ((str(tiny_folder), fingerprint(tiny_folder)), ("cd" * 32, "cd" * 32)):
        out = json.loads(printed(capsys, *call, "--model", model, "--json"))
        manifest = Store(out["store"], create=False).manifest(out["contexts"][0]["id"])
        assert manifest.model == expected


def test_the_bundled_models_profile_is_found_by_its_fingerprint(capsys: pytest.CaptureFixture[str]) -> None:
    from kvstream.testbed.engine.loading import load_model
    from kvstream.testbed.engine.model import calculate_kv

    model = load_model()
    kv = calculate_kv(model, list(CONTEXT["text"].encode()[:200]))
    tensors = {"kv": kv.to(torch.bfloat16).contiguous(), "token_ids": torch.zeros(200, dtype=torch.uint8)}
    save_file(tensors, "kv.safetensors", metadata={"model": model.fingerprint})
    out = json.loads(printed(capsys, "store", "--kv", "kv.safetensors", "--json"))
    assert out["contexts"][0]["id"].startswith("kv-kvstream-")
    save_file(tensors, "kv.safetensors", metadata={"model": "ab" * 32})
    assert "codec kvstream is not calibrated for model abababababab" in refused(
        capsys, "store", "--kv", "kv.safetensors"
    )


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"kv": torch.zeros(2, 2, 4, 1, 8)}, "has no tensor token_ids; it has kv"),
        ({"kv": torch.zeros(2, 3, 4, 1, 8), "token_ids": torch.arange(4)}, "kv is (2, 3, 4, 1, 8) of float32"),
        ({"kv": torch.zeros(2, 2, 4, 8), "token_ids": torch.arange(4)}, "kv is (2, 2, 4, 8) of float32"),
        ({"kv": torch.zeros(2, 2, 4, 1, 8).double(), "token_ids": torch.arange(4)}, "of float64"),
        ({"kv": torch.zeros(2, 2, 4, 1, 8), "token_ids": torch.arange(5)}, "token_ids is (5,) of torch.int64"),
        ({"kv": torch.zeros(2, 2, 4, 1, 8), "token_ids": torch.zeros(4)}, "token_ids is (4,) of torch.float32"),
        ({"kv": torch.zeros(2, 2, 4, 1, 8), "token_ids": torch.tensor([0, 1, -1, 2])}, "from -1 to 2 are outside"),
    ],
)
def test_files_that_are_no_caches(capsys: pytest.CaptureFixture[str], tensors: dict[str, Any], says: str) -> None:
    save_file(tensors, "bad.safetensors", metadata={"model": "ab" * 32})
    assert says in refused(capsys, "store", "--kv", "bad.safetensors", "--codec", "uniform")


def test_a_cache_that_a_codec_refuses_leaves_no_context(capsys: pytest.CaptureFixture[str]) -> None:
    kv = torch.full((2, 2, 4, 1, 8), torch.nan)
    save_file({"kv": kv, "token_ids": torch.arange(4)}, "bad.safetensors", metadata={"model": "ab" * 32})
    assert main(["store", "--kv", "bad.safetensors", "--codec", "uniform", "--to", "mine", "--json"]) == 2
    assert "use codec raw" in capsys.readouterr().err
    assert Store("mine").contexts() == []


def test_a_file_that_is_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.safetensors").write_bytes(b"not a file of tensors")
    assert "is not a safetensors file" in refused(capsys, "store", "--kv", "bad.safetensors")
    assert "no such file" in refused(capsys, "store", "--kv", "absent.safetensors")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("store",), "one of the two"),
        (("store", "docs", "--kv", "x.safetensors"), "one of the two"),
        (("fetch", "http://127.0.0.1:1", "docs", "--output", "x", "--prompt", "a"), "omit --model and --prompt"),
        (("fetch", "http://127.0.0.1:1", "docs", "--output", "x"), "no sender at http://127.0.0.1:1"),
    ],
)
def test_calls_that_cannot_be_meant(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str) -> None:
    assert says in refused(capsys, *argv)


# --- names


def test_names_of_contexts() -> None:
    made, other, own = "docs-kvstream-0123456789ab", "docs-raw-0123456789ab", "my-context"
    assert names_of(made) == (made, "docs-kvstream", "docs")
    assert names_of(own) == (own,)
    assert find_id("docs", [made, own]) == made
    assert find_id("docs-raw", [made, other]) == other
    assert find_id("docs", [made, "docs"]) == "docs"  # an id is always itself
    assert shortest_name(made, [made, own]) == "docs"
    assert shortest_name(made, [made, other]) == "docs-kvstream"
    assert shortest_name(made, [made, "docs-kvstream-ffffffffffff"]) == made
