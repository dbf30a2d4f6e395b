"""Two requests that come at once are both heard."""

from __future__ import annotations

import os

from kvstream.testbed.host.json_lines import Requests


def test_lines_come_whole_however_they_are_cut():
    source, sink = os.pipe()
    requests = Requests(source)
    os.write(sink, b'{"a": 1}\n{"b": 2}\n{"c"')
    assert requests.read() == [{"a": 1}, {"b": 2}]
    os.write(sink, b": 3}")
    assert requests.read() == []
    os.write(sink, b"\n")
    assert requests.read() == [{"c": 3}]
    os.close(sink)
    assert requests.read() is None
    os.close(source)
