from __future__ import annotations

import subprocess
import sys

import pytest

from kvstream.codec import registry
from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.codec.raw import Raw
from tests.codec.profiles import stored


def test_every_listed_codec_is_one() -> None:
    for name in registry.CODECS:
        cls = registry.codec_class(name)
        assert issubclass(cls, Codec)
        assert cls.codec_id == name


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(CodecError, match=r"unknown codec 'zip'; choose from .*raw, uniform"):
        registry.make("zip")
    with pytest.raises(CodecError, match="has no setting 'bits'"):
        registry.make("raw", {"bits": 3})


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("theirs", "kvstream.codec.raw:Raw", registry.ENTRY_POINT_GROUP),
        EntryPoint("broken", "codec.nowhere:Raw", registry.ENTRY_POINT_GROUP),
        EntryPoint("odd", "json:dumps", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert isinstance(registry.make("theirs"), Raw)
    assert "theirs" in registry.names()
    with pytest.raises(CodecError, match="cannot be imported"):
        registry.make("broken")
    with pytest.raises(CodecError, match="not a subclass"):
        registry.make("odd")


def test_configurations() -> None:
    config = registry.make("uniform").get_config()
    assert registry.from_config(config).get_config() == config
    for wrong in ({}, [], None, {"codec": 3}, {"codec": "raw", "settings": 1}, {"codec": "raw", "settings": {3: 1}}):
        for rebuild in (registry.from_config, Raw.from_config):
            with pytest.raises(CodecError):
                rebuild(wrong)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="has no setting 'bits'; it has none"):
        Raw.from_config({"codec": "raw", "settings": {"bits": 3}})
    with pytest.raises(CodecError, match=r"unknown entropy coder \[\]"):
        registry.make("cachegen", {"coder": []}, stored("cachegen"))  # type: ignore[dict-item]
    with pytest.raises(CodecError, match="needs profile"):
        registry.from_config({**config, "profile_sha256": "00"})
    with pytest.raises(CodecError, match="configuration is for"):
        Raw.from_config(config)


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, codec.registry as r; r.names(); assert not {'torch', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
