"""Quantities with units."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.traces.errors import TraceError
from kvstream.traces.units import (
    format_rate,
    format_time,
    parse_fraction,
    parse_quantity,
    parse_rate,
    parse_size,
    parse_time,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100Mbps", 100e6),
        ("10Gbit/s", 10e9),
        ("10 Gbit/s", 10e9),
        ("2.5mbps", 2.5e6),
        ("1gbit", 1e9),
        ("512kbit", 512e3),
        ("3MB/s", 24e6),
        ("3MBps", 24e6),
        ("1MiB/s", 8 * 2**20),
        ("7bps", 7.0),
        ("0.2s", 0.2),
        ("20ms", 0.02),
        ("150us", 150e-6),
        ("150µs", 150e-6),
        ("5min", 300.0),
        ("1h", 3600.0),
        ("0.1%", 0.001),
        ("64KiB", 65536.0),
        ("64kB", 64000.0),
        ("1.5MB", 1.5e6),
        ("1e6", 1e6),
        ("1e-3s", 1e-3),
        (" .5 ", 0.5),
        ("-3", -3.0),
        ("+3.", 3.0),
    ],
)
def test_quantities_become_si(text, value):
    assert parse_quantity(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "Mbps",
        "10 furlongs",
        "10Mb",
        "1,5s",
        "1e999s",
        "nan",
        "inf",
        "0x10",
        "1__0",
        "٣s",
        "10Mbps!",
        "1" * 200,
    ],
)
def test_nonsense_is_refused_in_one_line(text):
    with pytest.raises(TraceError) as caught:
        parse_quantity(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_rate, "20ms", "is a time; expected a rate"),
        (parse_time, "20Mbps", "is a rate; expected a time"),
        (parse_size, "20Mbps", "is a rate; expected a size"),
        (parse_fraction, "20s", "is a time; expected a fraction"),
        (parse_rate, "-1Mbps", "negative"),
        (parse_time, "-1s", "negative"),
        (parse_size, "-1B", "negative"),
        (parse_fraction, "101%", "more than 100%"),
    ],
)
def test_a_wrong_dimension_or_sign_is_refused(parse, text, says):
    with pytest.raises(TraceError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_rate, "30", "'30' has no unit; write 30Mbps, 30kbps or 30bps"),
        (parse_time, "800", "'800' has no unit; write 800s or 800ms"),
        (parse_size, "4096", "'4096' has no unit; write 4096B or 4096KiB"),
        (parse_time, " 1e-3 ", "'1e-3' has no unit; write 1e-3s or 1e-3ms"),
    ],
)
def test_numbers_without_the_unit_that_is_meant_are_refused(parse, text, says):
    with pytest.raises(TraceError, match=re.escape(says)):
        parse(text)


def test_nothing_needs_no_unit_and_neither_do_fractions():
    assert (parse_rate("0"), parse_time("0.0"), parse_size("0")) == (0.0, 0.0, 0)
    assert isinstance(parse_size("1.5KiB"), int)
    assert parse_fraction("0.001") == 0.001
    assert parse_quantity("3", "number") == 3.0
    assert parse_quantity("0.2", "time", bare=True) == 0.2


@given(st.floats(1.0, 1e12))
def test_formatted_rates_read_back(bps):
    assert parse_rate(format_rate(bps)) == pytest.approx(bps, rel=0.006)


@given(st.floats(1e-6, 1e4))
def test_formatted_times_read_back(seconds):
    assert parse_time(format_time(seconds)) == pytest.approx(seconds, rel=0.006)


def test_formats_choose_the_prefix_that_fits():
    assert format_rate(30e6) == "30 Mbit/s"
    assert format_rate(0.99999e9) == "1 Gbit/s"
    assert format_rate(0.0) == "0 bit/s"
    assert format_time(0.02) == "20 ms"
    assert format_time(60.0) == "60 s"
