"""The bitstream is what docs/bitstream.md says: a decoder written from that page reads every golden chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codec import kvstream, registry
from codec.profile import Profile
from codec.transform import Rope
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
def test_they_agree_on_what_golden_chunks_lack(interleaved: bool) -> None:
    """Wide columns, escapes, more tokens than a segment may hold, the other pairing of rotary dimensions."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.exp(2 * torch.randn((2, 2, 1, 1, 4), generator=draw))
    rope = Rope(100.0 ** -(torch.arange(2) / 2).repeat(2, 1), interleaved)
    profile = kvstream.fit([spread * torch.randn((2, 2, 600, 1, 4), generator=draw)], rope=rope)
    codec = registry.make("kvstream", {}, profile)
    kv = spread * torch.randn((2, 2, 600, 1, 4), generator=draw)
    kv[1, 0, 3] *= 100
    data = codec.encode(kv, len(codec.levels) - 1, positions=range(70, 670))
    sections = second_decoder.read_container(data).sections
    assert sections["fine"]
    assert sections["escs"]
    first = codec.decode(data).numpy()
    second = second_decoder.decode(data, profile.to_bytes())
    assert np.abs(first - second).max() <= 1e-5 * np.abs(second).max()
