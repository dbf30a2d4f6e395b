from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstream.codec import container, registry
from kvstream.codec.api import Codec
from kvstream.codec.artifact import half_of_layer
from kvstream.codec.errors import CodecError
from tests.codec.conformance import Conformance
from tests.codec.synthetic import synthetic_kv


class TestArtifact(Conformance):
    tolerance = (0.35, 0.1)
    entropy_coded = True

    @staticmethod
    def build() -> Codec:
        return registry.make("artifact")

    def test_values_match_the_public_code(self, codec: Codec) -> None:
        """Against its formula, `round(x * C / max + C)` and back, written out here."""
        kv = synthetic_kv(6, 30, 2, 8, seed=8, dtype=torch.float32)
        for level, bins in enumerate(((16, 16, 12), (32, 16, 16), (32, 32, 32))):
            decoded = codec.decode(self.encode(codec, kv, level))
            for layer in range(6):
                half = bins[layer // 2] // 2 - 1
                rows = kv[layer].flatten(2)
                largest = rows.abs().amax(dim=2, keepdim=True)
                symbols = (rows * (half / largest) + half).round()
                expected = (symbols - half) / half * largest
                wrong = (decoded[layer].flatten(2) - expected).abs() > 1e-4 * largest
                assert float(wrong.float().mean()) < 1e-3

    def test_everything_it_sends_is_counted(self, codec: Codec) -> None:
        """33 entries of 16 bits per column, 32-bit lengths per 256 tokens, a scale of the cache's dtype per vector."""
        kv = synthetic_kv(3, 600, 2, 8, seed=8)
        sections = container.inspect(self.encode(codec, kv, 1))["sections"]
        columns = 3 * 2 * 2 * 8
        assert sections["cdfs"] == columns * 33 * 2
        assert sections["lens"] == columns * 3 * 4
        assert sections["scal"] == 3 * 2 * 600 * 2

    def test_strings_match_torchac(self, codec: Codec) -> None:
        torchac = pytest.importorskip("torchac", reason="torchac is the optional reference coder")
        kv = synthetic_kv(3, 300, 1, 4, seed=8)
        chunk = container.parse(self.encode(codec, kv, 1))
        cdfs = np.frombuffer(chunk.section("cdfs"), "<i2").reshape(-1, 33)
        lengths = np.frombuffer(chunk.section("lens"), "<u4").reshape(2, len(cdfs))
        data = bytes(chunk.section("data"))
        rows = kv.flatten(3)
        halves = torch.tensor(half_of_layer(3, 1)).view(3, 1, 1, 1)
        scale = rows.abs().amax(dim=3, keepdim=True).float()
        symbols = ((rows.float() * halves / scale).round() + halves).transpose(2, 3).flatten(0, 2).to(torch.int16)
        at = 0
        for segment, first in enumerate((0, 256)):
            for column, cdf in enumerate(cdfs):
                part = symbols[column, first : first + 256].contiguous()
                table = torch.from_numpy(np.tile(cdf, (len(part), 1)))
                string = torchac.encode_int16_normalized_cdf(table, part)
                assert data[at : at + lengths[segment, column]] == string
                at += len(string)
        assert at == len(data)

    def test_hostile_tables(self, codec: Codec, kv: torch.Tensor) -> None:
        chunk = container.parse(self.encode(codec, kv))
        sections = {tag: bytes(content) for tag, content in chunk.sections.items()}
        flat = bytes(len(sections["cdfs"]))
        with pytest.raises(CodecError, match="CDF"):
            codec.decode(container.pack(chunk.header, sections | {"cdfs": flat}))
        lying = b"\xff\xff\xff\x7f" + sections["lens"][4:]
        with pytest.raises(CodecError, match="not as long"):
            codec.decode(container.pack(chunk.header, sections | {"lens": lying}))


def test_models_of_many_columns() -> None:
    """Llama-2-7B has 262,144 of them, and a coder's tables are at most 65,536."""
    codec = registry.make("artifact")
    kv = torch.randn((33, 2, 9, 1, 1_024), generator=torch.Generator().manual_seed(0))
    decoded = codec.decode(codec.encode(kv, 2, positions=range(9)))
    assert isinstance(decoded, torch.Tensor)
    assert float((decoded - kv).pow(2).mean().sqrt()) < 0.1


def test_bins_by_thirds() -> None:
    assert half_of_layer(9, 1) == [15, 15, 15, 7, 7, 7, 7, 7, 7]
    assert half_of_layer(8, 0) == [7, 7, 7, 7, 7, 7, 5, 5]
    assert half_of_layer(2, 2) == [15, 15]
