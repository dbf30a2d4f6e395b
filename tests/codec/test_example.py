"""The example codec passes what every codec must."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kvstream.codec import registry
from kvstream.codec.api import Codec
from tests.codec.conformance import Conformance

FILE = Path(__file__).parents[2] / "examples" / "my_codec.py"


class TestZip(Conformance):
    tolerance = (0.1, 0.0)

    @staticmethod
    def build() -> Codec:
        spec = importlib.util.spec_from_file_location("my_codec", FILE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["my_codec"] = module
        spec.loader.exec_module(module)
        return module.Zip()

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(registry.CODECS, "zip", "my_codec:Zip")

    test_golden = None  # an example has no bitstream to keep
