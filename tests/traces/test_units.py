"""Quantities with units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.units import (
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
        (parse_rate, "20ms", "is a time, where a rate is wanted"),
        (parse_time, "20Mbps", "is a rate, where a time is wanted"),
        (parse_size, "20Mbps", "is a rate, where a size is wanted"),
        (parse_fraction, "20s", "is a time, where a fraction is wanted"),
        (parse_rate, "-1Mbps", "negative"),
        (parse_time, "-1s", "negative"),
        (parse_size, "-1B", "negative"),
        (parse_fraction, "101%", "more than 100%"),
    ],
)
def test_a_wrong_dimension_or_sign_is_refused(parse, text, says):
    with pytest.raises(TraceError, match=says):
        parse(text)


def test_bare_numbers_are_si():
    assert parse_rate("1e6") == 1e6
    assert parse_time("0.2") == 0.2
    assert parse_size("4096") == 4096
    assert isinstance(parse_size("1.5KiB"), int)
    assert parse_fraction("0.001") == 0.001


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
