"""LMCache itself, through its StorageManager: our chunks stored in its L2 and loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from kvstream.codec.layouts import from_lmcache  # noqa: E402
from kvstream.testbed.encoding import calibrate  # noqa: E402
from kvstream.testbed.engine.loading import load_model  # noqa: E402
from kvstream.testbed.engine.model import calculate_kv  # noqa: E402
from kvstream.testbed.workloads.contexts import find_contexts  # noqa: E402
from tests.engines.environments import Program, python_of, running, versions  # noqa: E402

CHUNK_TOKENS = 256
LEVEL = 3


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    python = python_of("lmcache")
    log = tmp_path_factory.mktemp("log") / "lmcache.log"
    with running(Program([str(python), "-m", "tests.engines.lmcache_program"], log)) as program:
        yield program


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Path]:
    """A file of chunks `a` to `d` of a context, as LMCache holds them, and the profile of their model."""
    python_of("lmcache")
    folder = tmp_path_factory.mktemp("chunks")
    model = load_model(dtype="bfloat16")
    codec = calibrate.make_codec("kvstream", model)
    profile = folder / "tiny-kv.profile"
    profile.write_bytes(codec.profile.to_bytes())
    kv = calculate_kv(model, model.encode(find_contexts(["prose"])[0].text.decode())[: 4 * CHUNK_TOKENS])
    parts = kv.transpose(0, 1).flatten(3).split(CHUNK_TOKENS, dim=2)
    tensors = {name: part.contiguous() for name, part in zip("abcd", parts, strict=True)}
    save_file(tensors, folder / "kv.safetensors")
    return folder / "kv.safetensors", tensors, profile


def adapter_of(folder: Path, serde: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "plugin",
        "module_path": "kvstream.testbed.connectors.lmcache",
        "class_name": "FolderAdapter",
        "adapter_params": {"base_path": str(folder)},
        "serde": {"type": "kvstream", **serde},
    }


def round_trip(program: Program, kv: Path, folder: Path, adapter: dict[str, Any], **more: Any) -> dict[str, Any]:
    command = {"kv": str(kv), "folder": str(folder), "adapter": adapter, "damage": None, "patience_s": 60} | more
    return dict(program.ask(**command))


def test_version() -> None:
    found = versions(python_of("lmcache"), "lmcache", "torch")
    print(found)
    assert found["lmcache"].startswith("0.5.")


def test_chunks_come_back_as_our_codec_decodes_them(program: Program, chunks: Any, tmp_path: Path) -> None:
    """With positions that only the keys tell: as if encoded with the true ones."""
    kv, tensors, profile = chunks
    serde = {"level": LEVEL, "heads": 5, "profile": str(profile)}
    answer = round_trip(program, kv, tmp_path, adapter_of(tmp_path, serde))
    assert answer["found"] == ["a", "b", "c", "d"], program.tail()
    codec = calibrate.make_codec("kvstream", load_model(dtype="bfloat16"))
    found = load_file(tmp_path / "found.safetensors")
    sizes = []
    for index, (name, tensor) in enumerate(tensors.items()):
        start = index * CHUNK_TOKENS
        data = codec.encode(from_lmcache(tensor, 5), LEVEL, positions=range(start, start + CHUNK_TOKENS))
        expected: Any = codec.decode(data)
        assert torch.equal(from_lmcache(found[name], 5), expected)
        sizes.append(len(data) + 32)
    assert answer["sizes"] == sizes
    raw = tensors["a"].numel() * tensors["a"].itemsize
    print(f"4 chunks of {raw} bytes in files of {answer['sizes']}")
    assert max(sizes) < raw / 4


def test_raw_is_exact(program: Program, chunks: Any, tmp_path: Path) -> None:
    kv, tensors, _ = chunks
    answer = round_trip(program, kv, tmp_path, adapter_of(tmp_path, {"codec": "raw", "heads": 5}))
    assert answer["found"] == sorted(tensors)
    found = load_file(tmp_path / "found.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_two_layers_are_not_swapped(program: Program, tmp_path: Path) -> None:
    """`[2, L, T, H * D]` with L = 2 looks like `[L, 2, T, H * D]`."""
    tensors = {name: torch.randn(2, 2, 64, 24).to(torch.bfloat16) for name in "ab"}
    save_file(tensors, tmp_path / "kv.safetensors")
    folder = tmp_path / "cache"
    answer = round_trip(program, tmp_path / "kv.safetensors", folder, adapter_of(folder, {"codec": "fp8", "heads": 3}))
    assert answer["found"] == ["a", "b"]
    found = load_file(folder / "found.safetensors")
    for name, tensor in tensors.items():
        assert (found[name] - tensor).abs().max() < 0.1 * tensor.abs().max()


@pytest.mark.parametrize(("damage", "left"), [("bit", ["b", "c", "d"]), ("swap", ["c", "d"])])
def test_damaged_and_misplaced_files_are_misses(
    program: Program, chunks: Any, tmp_path: Path, damage: str, left: list[str]
) -> None:
    kv, tensors, _ = chunks
    adapter = adapter_of(tmp_path, {"codec": "raw", "heads": 5})
    answer = round_trip(program, kv, tmp_path, adapter, damage=damage)
    assert answer["found"] == left
    found = load_file(tmp_path / "found.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in left)


def test_what_cannot_be_encoded_is_not_stored(program: Program, chunks: Any, tmp_path: Path) -> None:
    """Heads that the profile does not have: an error in LMCache's log, and no file."""
    kv, _, profile = chunks
    serde = {"level": LEVEL, "heads": 4, "profile": str(profile)}
    answer = round_trip(program, kv, tmp_path, adapter_of(tmp_path, serde), patience_s=5)
    assert answer == {"found": [], "sizes": []}


def test_lmcaches_own_adapter_cannot_load_encoded_chunks(program: Program, chunks: Any, tmp_path: Path) -> None:
    """Why there is an adapter of ours; once this fails, it can go."""
    kv, _, _ = chunks
    adapter = {"type": "fs", "base_path": str(tmp_path), "serde": {"type": "kvstream", "codec": "raw", "heads": 5}}
    answer = round_trip(program, kv, tmp_path, adapter, **{"import": "kvstream.testbed.connectors.lmcache"})
    assert len(answer["sizes"]) == 4
    assert answer["found"] == []
