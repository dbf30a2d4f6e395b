from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testbed.dashboard.events import ChunkNews, RunEnd, RunStart, SessionEnd, SessionStart, append, read


def test_every_event_is_one_line_of_json_with_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append(file, RunStart("main", "mininet", ["cachegen"], 72))
    append(file, SessionStart("000", "cachegen", "cachegen", "cachegen", "docs", "steady", 1.0, 16, 4, [(0.0, 3e7)]))
    append(file, ChunkNews("000", "cachegen", 0.1, {"chunk": 0, "level": "text", "bytes": 512}))
    append(file, SessionEnd({"unit_id": "000", "met": True}))
    append(file, RunEnd("fine"))
    kinds = [json.loads(line)["event"] for line, _ in read(file)]
    assert kinds == ["run_start", "session_start", "chunk", "session_end", "run_end"]


def test_reading_goes_on_where_it_stopped_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert list(read(file)) == []
    append(file, RunEnd("one"))
    [(_, offset)] = read(file)
    with file.open("a") as stream:
        stream.write('{"event": "run')
    assert list(read(file, offset)) == []
    with file.open("a") as stream:
        stream.write('_end"}\n')
    assert [line for line, _ in read(file, offset)] == ['{"event": "run_end"}']


def test_lines_of_many_writers_never_mix(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    long = ChunkNews("u", "s", 0.0, {"reason": {"x" * 2000: 1.0}})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: append(file, long), range(200)))
    assert [json.loads(line)["event"] for line, _ in read(file)] == ["chunk"] * 200
