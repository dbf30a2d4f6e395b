"""The bitstream is what docs/bitstream.md says: a decoder written from that page reads every golden chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstream.codec import registry
from kvstream.codec.kvstream import fit
from kvstream.codec.profile import Profile
from kvstream.codec.transform import Rope
from tests.codec import second_decoder
from tests.codec.conformance import GOLDEN

CHUNKS = sorted(GOLDEN.glob("*.bin"))


@pytest.mark.parametrize("path", CHUNKS, ids=lambda path: path.stem)
def test_both_decoders_agree(path: Path) -> None:
    stored = path.read_bytes()
    data = stored[4 : 4 + int.from_bytes(stored[:4], "little")]
    name, _, coder = path.name.partition("-v")[0].partition("-")
    file = GOLDEN / f"{name}.profile"
    profile = file.read_bytes() if file.exists() else None
    codec = registry.make(
        name, {"coder": coder} if coder else {}, None if profile is None else Profile.from_bytes(profile)
    )
    ours = codec.decode(data)
    assert isinstance(ours, torch.Tensor)
    first = codec.decode(data, torch.empty(ours.shape)).numpy()
    second = second_decoder.decode(data, profile, coder or "rans")
    assert np.abs(first - second).max() <= 1e-5 * np.abs(second).max()


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_decoders_agree_on_what_golden_chunks_lack(interleaved: bool) -> None:
    """Wide columns, escapes, tokens apart, segments, the other pairing of rotary dimensions; no transform."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.exp(2 * torch.randn((3, 2, 1, 1, 4), generator=draw))
    rope = Rope(100.0 ** -(torch.arange(2) / 2).repeat(3, 1), interleaved)
    sample = spread * torch.randn((3, 2, 600, 1, 4), generator=draw)
    profile = fit([sample], rope=rope, sinks=3, group=2, target_bits=(0.3, 5.0))
    codec = registry.make("kvstream", {}, profile)
    kv = spread * torch.randn((3, 2, 600, 1, 4), generator=draw)
    kv[1, 0, 33] *= 100
    kv[1, 1, 555] = 1e7
    found = {}
    for level in (0, 1):
        data = codec.encode(kv, level, positions=range(1, 601))
        found[level] = second_decoder.read_container(data).sections
        assert_agree(codec.decode(data).numpy(), second_decoder.decode(data, profile.to_bytes()))
    assert all(found[1].values())
    assert len(second_decoder.escapes(found[1]["escs"]))
    plain = codec.encode(1e4 * kv[:, :, :20], 1, positions=range(20))
    assert "bits" in second_decoder.read_container(plain).sections
    assert_agree(codec.decode(plain).numpy(), second_decoder.decode(plain, profile.to_bytes()))
    nothing = codec.encode(torch.zeros(3, 2, 9, 1, 4) + codec.parameters.mean[:, :, None], 0, positions=range(3, 12))
    assert_agree(codec.decode(nothing).numpy(), second_decoder.decode(nothing, profile.to_bytes()))


def assert_agree(first: Any, second: Any) -> None:
    """Within float32's rounding of a token's largest magnitude."""
    assert (np.abs(first - second).max(axis=(0, 1, 3, 4)) <= 1e-5 * np.abs(second).max(axis=(0, 1, 3, 4))).all()
