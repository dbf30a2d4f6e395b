"""Chunks under other systems' keys: refused when damaged or misplaced, with positions found from the keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from kvstream.codec import registry  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.testbed.connectors.keyed import KeyedCodec  # noqa: E402
from kvstream.testbed.encoding import calibrate  # noqa: E402
from kvstream.testbed.engine.loading import bundled_model_path, load_model  # noqa: E402
from kvstream.testbed.engine.model import calculate_kv  # noqa: E402
from kvstream.testbed.workloads import contexts  # noqa: E402

KV = torch.randn(2, 2, 24, 3, 8).to(torch.bfloat16)


def test_round_trip_in_a_longer_buffer() -> None:
    keyed = KeyedCodec(registry.make("raw"), 0)
    value = keyed.encode(KV, b"key", None)
    out = torch.empty_like(KV)
    keyed.decode(memoryview(value + bytes(1000)), b"key", out)
    assert torch.equal(out, KV)


def test_damaged_and_misplaced_values_are_refused() -> None:
    keyed = KeyedCodec(registry.make("raw"), 0)
    value = keyed.encode(KV, b"key", 0)
    for at in (0, 40, len(value) - 1):
        damaged = bytearray(value)
        damaged[at] ^= 1
        with pytest.raises(CodecError):
            keyed.decode(memoryview(damaged), b"key", torch.empty_like(KV))
    with pytest.raises(CodecError, match="under this key"):
        keyed.decode(memoryview(value), b"another key", torch.empty_like(KV))
    for length in (0, 31, 32, 40, len(value) - 1):
        with pytest.raises(CodecError):
            keyed.decode(memoryview(value)[:length], b"key", torch.empty_like(KV))


def test_settings() -> None:
    keyed = KeyedCodec.of({"codec": "uniform"})
    assert keyed.level == len(keyed.codec.levels) - 1
    assert KeyedCodec.of({"codec": "uniform", "level": 0}).level == 0
    for level in (-1, 99, True, "1"):
        with pytest.raises(CodecError, match="level"):
            KeyedCodec.of({"codec": "uniform", "level": level})


def test_the_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.profile"
    path.write_bytes(calibrate.profile_of("kvstream", load_model()).to_bytes())
    settings = {"profile": str(path), "model": "bundled"}
    assert KeyedCodec.of(settings).level == len(calibrate.make_codec("kvstream", load_model()).levels) - 1
    other = tmp_path / "other"
    shutil.copytree(bundled_model_path(), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    with pytest.raises(CodecError, match="was calibrated for model"):
        KeyedCodec.of(settings | {"model": str(other)})


def test_positions_are_found_from_the_keys() -> None:
    model = load_model()
    tokens = model.encode(contexts.load_contexts()[0].text.decode())[:768]
    kv = calculate_kv(model, tokens)
    codec = calibrate.make_codec("kvstream", model)
    keyed = KeyedCodec(codec, 2)
    for start in (0, 256, 512):
        chunk = kv[:, :, start : start + 256]
        found = keyed.encode(chunk, b"key", None, range(0, 8192, 256))
        assert found == keyed.encode(chunk, b"key", start)
        assert len(found) < 0.7 * len(keyed.encode(chunk, b"key", start + 4096))
