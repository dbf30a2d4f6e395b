"""`kvstream store --to URL` and `kvstream serve URL` over a real S3 server; every refusal is one line."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstream.testbed.cli import main
from kvstream.testbed.store.opening import open_store
from tests.pages import ROOT
from tests.test_base_install import EVERY, PROGRAM, extras
from tests.testbed.store.test_bucket import content, fill

pytest.importorskip("s3fs", reason="needs the extra [s3]")


@contextmanager
def serving(hidden: set[str], *argv: str) -> Iterator[str]:
    """URL of `kvstream serve` in a process without these packages."""
    command = [sys.executable, "-c", PROGRAM, " ".join(sorted(hidden)), "serve", *argv, "--port", "0", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.terminate()
        process.communicate(timeout=20)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Status, and the last line of what was said: before it, encoding may have been announced."""
    status = main(list(argv))
    said = capsys.readouterr()
    assert said.out == ""
    *_, line = said.err.splitlines()
    return status, line


def test_a_sender_of_a_bucket_needs_no_torch(s3: str) -> None:
    """Nor anything else of the other extras."""
    fill(open_store(s3), "one")
    with serving(EVERY - extras("s3"), s3) as url:
        with urllib.request.urlopen(f"{url}/v1/contexts", timeout=20) as answer:
            assert json.load(answer) == {"contexts": ["one"]}
        with urllib.request.urlopen(f"{url}/v1/contexts/one/chunks/2/1", timeout=20) as answer:
            assert answer.read() == content("2/1")
        request = urllib.request.Request(f"{url}/v1/contexts/one/chunks/2/0", headers={"Range": "bytes=5-9"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.read() == content("2/0")[5:10]


def test_store_into_a_bucket_serve_and_fetch(s3: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="encoding needs the extra [run]")
    from safetensors.torch import safe_open, save_file

    kv = torch.randn(2, 2, 70, 3, 8).to(torch.bfloat16)
    cache, arrived = tmp_path / "mine.safetensors", tmp_path / "arrived.safetensors"
    save_file({"kv": kv, "token_ids": torch.arange(70)}, cache, metadata={"model": "ab" * 32})
    call = ["store", "--kv", str(cache), "--codec", "raw", "--to", s3]
    assert main([*call, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["store"] == s3
    assert main(call) == 0  # not encoded again
    assert capsys.readouterr().out.splitlines()[-1] == f"serve it: kvstream serve {s3}"
    with serving(set(), s3) as url:
        assert main(["fetch", url, stored["contexts"][0]["id"], "--output", str(arrived)]) == 0
    with safe_open(arrived, "pt") as file:
        assert torch.equal(file.get_tensor("kv"), kv)


def test_a_quota_of_the_command_line(s3: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="encoding needs the extra [run]")
    from safetensors.torch import save_file

    cache = tmp_path / "mine.safetensors"
    save_file({"kv": torch.zeros(2, 2, 70, 3, 8), "token_ids": torch.arange(70)}, cache, metadata={"model": "ab" * 32})
    status, line = refused(
        capsys, "store", "--kv", str(cache), "--codec", "raw", "--to", s3, "--quota", "1kB", "--json"
    )
    assert (status, "the store's quota is 1000" in line) == (2, True)
    assert open_store(s3).contexts() == []


@pytest.mark.parametrize("command", [("serve",), ("store", "docs", "--to")])
@pytest.mark.parametrize(
    ("where", "change", "status", "says"),
    [
        ("s3://{new}/x", {}, 2, "there is no bucket '{new}'; create it, or check the name"),
        ("s3://", {}, 2, "give a bucket, as in s3://bucket/prefix"),
        ("gopher://x/y", {}, 2, "give a folder, s3://bucket/prefix"),
        ("{s3}", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 4, "set AWS_ACCESS_KEY_ID and"),
        ("{s3}", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 4, "check AWS_ENDPOINT_URL and the network"),
    ],
    ids=["bucket", "name", "scheme", "credentials", "endpoint"],
)
def test_what_cannot_be_opened_is_one_line(
    s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    command: tuple[str, ...], where: str, change: dict[str, str], status: int, says: str,
) -> None:  # fmt: skip
    import s3fs

    new = f"b{secrets.token_hex(8)}"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    url = where.format(new=new, s3=s3)
    found, line = refused(capsys, *command, url)
    assert (found, line.startswith(f"kvstream: {url}")) == (status, True)
    assert says.format(new=new) in line
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("missing", ["s3fs", "fsspec"])
def test_a_missing_extra_is_named(missing: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, missing, "serve", "s3://bucket/x"]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 4
    [line] = done.stderr.splitlines()
    assert f"s3:// needs package {missing}; run: pip install -e '.[s3]'" in line


def test_nothing_there_yet(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = refused(capsys, "serve", s3)
    assert (status, line) == (
        2, f"kvstream: {s3} is not a store: nothing is there yet; fill it with kvstream store --to"
    )  # fmt: skip
