from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile


def test_round_trip_and_hash(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.uint8).reshape(2, 3), "a": np.ones(4, np.float16)}
    profile = Profile(tensors, {"codec": "x", "n": 3})
    path = tmp_path / "profile"
    path.write_bytes(profile.to_bytes())
    again = Profile.load(path)
    assert again.sha256 == profile.sha256
    assert again.codec_id == "x"
    assert again.number("n") == 3
    assert np.array_equal(again.tensor("b", np.uint8, (2, None)), profile.tensors["b"])
    other = Profile(profile.tensors, {"codec": "x", "n": 4})
    assert other.sha256 != profile.sha256
    same = Profile({"a": profile.tensors["a"], "b": profile.tensors["b"]}, {"n": 3, "codec": "x"})
    assert same.sha256 == profile.sha256
    with pytest.raises(ValueError, match="read-only"):
        again.tensors["b"][0, 0] = 1


def test_checks() -> None:
    profile = Profile({"a": np.array([1.0, np.nan], np.float32)}, {"codec": "x"})
    for name, dtype, shape in (("z", np.float32, (2,)), ("a", np.float16, (2,)), ("a", np.float32, (3,))):
        with pytest.raises(CodecError, match="calibrate again"):
            profile.tensor(name, dtype, shape)
    with pytest.raises(CodecError, match="not finite"):
        profile.tensor("a", np.float32, (2,))
    with pytest.raises(CodecError, match="not a positive"):
        profile.number("n")


def test_bytes_that_are_not_a_profile_are_refused(tmp_path: Path) -> None:
    import safetensors.numpy

    good = Profile({"a": np.ones(4, np.float32)}, {"codec": "x"}).to_bytes()
    plain = safetensors.numpy.save({"a": np.ones(1)})
    wrong = safetensors.numpy.save({"a": np.ones(1)}, {"kvstream": '{"format": 99}'})
    deep = safetensors.numpy.save({"a": np.ones(1)}, {"kvstream": "[" * 100_000})
    for data in (b"", b"KVST", good[:-1], good[:20], b"\xff" * 64, plain, wrong, deep):
        with pytest.raises(CodecError):
            Profile.from_bytes(data)
    with pytest.raises(CodecError, match="cannot be read"):
        Profile.load(tmp_path / "missing")
