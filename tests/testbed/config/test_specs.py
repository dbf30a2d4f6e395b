from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from kvstream.codec import registry
from kvstream.codec.errors import CodecError
from kvstream.policies.errors import PolicyError
from kvstream.testbed.config import build, specs
from kvstream.testbed.errors import SpecError
from kvstream.traces.errors import TraceError
from kvstream.traces.resolve import open_trace
from kvstream.traces.units import Fraction


@dataclass(frozen=True)
class Example:
    horizon: int = 3
    delay_s: float = 0.0
    loss: float = 0.0
    level: int | Literal["lowest", "highest"] = "lowest"
    eager: bool = False
    note: str = ""
    cap_bps: float | None = None
    room_s: float = 0.1
    room_bytes: int | None = None
    share: Fraction = 0.5
    gain: Annotated[float, "as large as it likes"] = 1.0
    any_unit: float = 0.0
    s: float = 0.0


def test_a_name_with_settings_is_parsed_and_written_back():
    spec = specs.parse("mpc,horizon=5,note=a b")
    assert spec.name == "mpc"
    assert spec.settings == {"horizon": "5", "note": "a b"}
    assert str(spec) == "mpc,horizon=5,note=a b"
    assert specs.parse("cachegen+compute,margin=0.1").name == "cachegen+compute"


def test_a_file_of_any_name_holds_a_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "a,b=c.py"):
        (tmp_path / name).write_text("")
        assert specs.parse(f"./{name}:Mine,share=0.7") == specs.Spec(f"./{name}:Mine", {"share": "0.7"})
    assert specs.parse('"./a,b.py:Mine",share=0.7').name == "./a,b.py:Mine"


def test_settings_take_the_types_and_units_of_their_fields():
    built = specs.build(
        Example, specs.parse_settings("horizon=5,delay=20ms,loss=0.1%,level=highest,eager=on,cap=3Mbps"), "example"
    )
    assert built == Example(5, 0.02, pytest.approx(0.001), "highest", True, "", 3e6)


def test_an_annotation_of_someone_else_is_none_of_ours():
    assert specs.build(Example, {"gain": "0.7"}, "example").gain == 0.7


def test_the_unit_says_which_of_two_fields_is_meant():
    for text, s, size in (("room=20ms", 0.02, None), ("room=64KiB", 0.1, 65536), ("room_s=3", 3.0, None)):
        built = specs.build(Example, specs.parse_settings(text), "example")
        assert (built.room_s, built.room_bytes) == (s, size)
    with pytest.raises(SpecError, match="room_bytes is given twice"):
        specs.build(Example, specs.parse_settings("room=64KiB,room_bytes=5"), "example")


def test_a_field_that_names_no_unit_takes_any():
    for text, value in (("20ms", 0.02), ("1kB", 1000.0), ("5%", 0.05)):
        assert specs.build(Example, {"any_unit": text}, "example").any_unit == value
        assert specs.build(Example, {"s": text}, "example").s == value


def test_a_union_takes_the_narrow_type_first():
    assert specs.build(Example, {"level": "2"}, "example").level == 2
    assert specs.build(Example, {"cap_bps": "none"}, "example").cap_bps is None


@pytest.mark.parametrize("text", ["", ",a=1", "a=1", "name,a", "name,=1", "name,a=", "name,a=1,a=2"])
def test_what_does_not_follow_the_grammar_is_refused(text):
    with pytest.raises(SpecError):
        specs.parse(text)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hoizon": "5"}, "horizon"),
        ({"horizon": "2.5"}, "whole number"),
        ({"delay": "fast"}, "delay"),
        ({"level": "middle"}, "level"),
        ({"eager": "maybe"}, "on or off"),
        ({"delay": "0.1%"}, "delay: '0.1%' is a fraction; expected a time"),
        ({"delay_s": "50B"}, "expected a time"),
        ({"share": "20ms"}, "share: '20ms' is a time; expected a fraction"),
        ({"cap": "20ms"}, "expected a rate"),
        ({"room": "5%"}, "expected a time"),
        ({"room_bytes": "5ms"}, "expected a size"),
    ],
)
def test_a_wrong_setting_names_what_would_be_right(settings, says):
    with pytest.raises(SpecError, match=says) as caught:
        specs.build(Example, settings, "example")
    assert "\n" not in str(caught.value)


def a_codec(text):
    name, settings = build.codec_spec(text)
    return registry.make(name, settings)


@pytest.mark.parametrize("name", ["./a\nb.py:C", "./" + "é\u202e" * 100 + ".py:C", "\u202e" * 990, "a\n" * 100])
@pytest.mark.parametrize("make", [build.make_policy, build.make_link, a_codec, open_trace])
def test_whatever_is_repeated_stays_a_short_line(make, name):
    said = []
    for text in (name, f"lte-walk,{name}", f"kvstream,{name}=1", f"uniform,low={name}", f"delay={name}"):
        try:
            make(text)
        except (SpecError, PolicyError, CodecError, TraceError) as error:
            said.append(str(error))
    assert len(said) >= 4
    assert all(len(message) < 2000 and "\n" not in message for message in said)
