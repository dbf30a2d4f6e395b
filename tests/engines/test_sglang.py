"""SGLang's HiCache with our backend, made by SGLang's factory. Not inside a running engine, which needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from kvstream.testbed.encoding import calibrate  # noqa: E402
from kvstream.testbed.engine.loading import load_model  # noqa: E402
from kvstream.testbed.engine.model import calculate_kv  # noqa: E402
from kvstream.testbed.workloads.contexts import find_contexts  # noqa: E402
from tests.engines.environments import Program, python_of, running, versions  # noqa: E402

TOKENS, PAGE, LEVEL = 512, 64, 3
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    python = python_of("sglang")
    log = tmp_path_factory.mktemp("log") / "sglang.log"
    with running(Program([str(python), "-m", "tests.engines.sglang_program"], log)) as program:
        yield program


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Path]:
    """A file of a context's cache, the cache, and the profile of its model."""
    python_of("sglang")
    folder = tmp_path_factory.mktemp("kv")
    model = load_model(dtype="bfloat16")
    profile = folder / "tiny-kv.profile"
    profile.write_bytes(calibrate.make_codec("kvstream", model).profile.to_bytes())
    kv = calculate_kv(model, model.encode(find_contexts(["prose"])[0].text.decode())[:TOKENS])
    save_file({"kv": kv.contiguous()}, folder / "kv.safetensors")
    return folder / "kv.safetensors", kv, profile


def round_trip(program: Program, kv: Path, folder: Path, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    command = {"layout": "layer_first", "v1": True, "damage": False, **more}
    return dict(program.ask(kv=str(kv), config={"folder": str(folder), **config}, **command))


def test_version() -> None:
    found = versions(python_of("sglang"), "sglang", "torch")
    print(found)
    assert found["sglang"].startswith("0.5.")


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_pages_are_exact(program: Program, cache: Any, tmp_path: Path, layout: str, v1: bool) -> None:
    file, kv, _ = cache
    answer = round_trip(program, file, tmp_path, {"codec": "raw"}, layout=layout, v1=v1)
    assert answer["came"] == [True] * (TOKENS // PAGE), program.tail()
    assert answer["missing"]
    assert answer["cleared"]
    assert torch.equal(load_file(tmp_path / "found.safetensors")["kv"], kv)


@pytest.mark.parametrize("v1", [True, False])
def test_pages_are_what_our_codec_decodes(program: Program, cache: Any, tmp_path: Path, v1: bool) -> None:
    """At their true positions: told by SGLang, or found from the keys."""
    file, kv, profile = cache
    answer = round_trip(program, file, tmp_path, {"level": LEVEL, "profile": str(profile)}, v1=v1)
    assert answer["came"] == [True] * (TOKENS // PAGE), program.tail()
    codec = calibrate.make_codec("kvstream", load_model(dtype="bfloat16"))
    found = load_file(tmp_path / "found.safetensors")["kv"]
    sizes = []
    for start in range(0, TOKENS, PAGE):
        data = codec.encode(kv[:, :, start : start + PAGE], LEVEL, positions=range(start, start + PAGE))
        expected: Any = codec.decode(data)
        assert torch.equal(found[:, :, start : start + PAGE], expected)
        sizes.append(len(data) + 32)
    assert sorted(answer["sizes"]) == sorted(sizes)


def test_a_damaged_page_is_a_miss(program: Program, cache: Any, tmp_path: Path) -> None:
    file, kv, _ = cache
    answer = round_trip(program, file, tmp_path, {"codec": "raw"}, damage=True)
    assert answer["came"].count(False) == 1
    lost = answer["came"].index(False) * PAGE
    found = load_file(tmp_path / "found.safetensors")["kv"]
    assert not found[:, :, lost : lost + PAGE].any()
    assert torch.equal(found[:, :, :lost], kv[:, :, :lost])
    assert torch.equal(found[:, :, lost + PAGE :], kv[:, :, lost + PAGE :])
