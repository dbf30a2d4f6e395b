from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvstream.testbed import events
from kvstream.testbed.events import ChunkNews, RunEnd, RunStart, SessionEnd, SessionStart, append, read
from kvstream.testbed.receiver.chunk_events import ChunkEventWriter
from kvstream.testbed.session.record import ChunkRecord


def test_every_event_is_one_line_of_json_with_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append(file, RunStart("main", "mininet", ["mpc"], 72))
    append(
        file, SessionStart("000", "mpc", "mpc,horizon=5", "cachegen", "docs", "steady", 1.0, 16, 4, [(0.0, 3e7)], 2.5)
    )
    append(file, ChunkNews("000", "mpc", 0.1, {"chunk": 0, "level": "text", "bytes": 512}))
    append(file, SessionEnd({"unit_id": "000", "met": True}))
    append(file, RunEnd("fine"))
    assert [json.loads(line) for line, _ in read(file)] == [
        {"event": "run_start", "name": "main", "backend": "mininet", "schemes": ["mpc"], "sessions": 72},
        {"event": "session_start", "unit_id": "000", "scheme": "mpc", "policy": "mpc,horizon=5", "codec": "cachegen",
         "context": "docs", "trace": "steady", "deadline_s": 1.0, "n_chunks": 16, "n_levels": 4,
         "capacity": [[0.0, 3e7]], "capacity_until_s": 2.5, "clairvoyant": False, "depth": 2, "overlap": True},
        {"event": "chunk", "unit_id": "000", "scheme": "mpc", "t_s": 0.1,
         "record": {"chunk": 0, "level": "text", "bytes": 512}},
        {"event": "session_end", "row": {"unit_id": "000", "met": True}},
        {"event": "run_end", "verdict": "fine"},
    ]  # fmt: skip


def test_reading_resumes_where_it_stopped_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
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
    assert [line for line, _ in read(file)] == [events.line(long)] * 200


def test_only_chunks_that_changed_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    chunks = [ChunkRecord(0, 2, 1000, 0.1), ChunkRecord(1)]
    write = ChunkEventWriter(file, "000", "cachegen")
    write(chunks, 0.10)
    write(chunks, 0.15)
    chunks[0].received_bytes = 400
    write(chunks, 0.20)
    chunks[0].last_byte_s = 0.24
    chunks[1].request_s = 0.22
    write(chunks, 0.25)
    news = [json.loads(line) for line, _ in read(file)]
    assert [(one["t_s"], one["record"]["chunk"]) for one in news] == [(0.10, 0), (0.20, 0), (0.25, 0), (0.25, 1)]
    assert news[-2]["record"]["last_byte_s"] == 0.24
