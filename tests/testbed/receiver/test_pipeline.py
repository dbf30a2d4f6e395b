"""Chunks arrive in few slots, are decoded piece by piece, and slow the link down: on the CPU, as tests/gpu on a GPU."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch, from the extra [run]")

import torch

from kvstream.codec.kvstream import KVStream
from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.testbed.engine import buffers
from kvstream.testbed.engine.buffers import ChunkBuffers, IncomingChunk
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.engine.streams import streams_of
from kvstream.testbed.errors import SpecError
from kvstream.testbed.receiver.background_load import GemvLoop, Round, slowdown
from kvstream.testbed.session.record import SessionFailed
from tests.testbed import pipeline
from tests.testbed.made import even
from tests.testbed.pipeline import CHUNK_TOKENS, CONTEXT, LEVEL, Kitchen, Plan

N_CHUNKS = -(-pipeline.TOKENS // pipeline.CHUNK_TOKENS)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = pipeline.make(tmp_path_factory.mktemp("store"), "cpu", max_slots=2)
    yield made
    made.engine.close()
    torch.set_num_threads(threads)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks are decoded in pieces of 2 KB; gives the number of bytes of each piece."""
    seen: list[int] = []
    monkeypatch.setattr(ModelEngine, "decodes_pieces", property(lambda self: True))
    monkeypatch.setattr(buffers, "PIECE_BYTES", 2048)
    monkeypatch.setattr(buffers, "FIRST_PIECE_BYTES", 1024)
    decoder = KVStream.decoder

    def counting(self: KVStream, out: Any, **settings: Any) -> Any:
        made = decoder(self, out, **settings)
        feed = made.feed
        made.feed = lambda view, source=None: (seen.append(len(view)), feed(view, source))[1]  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(KVStream, "decoder", counting)
    return seen


def test_the_cache_that_arrives_is_the_one_that_was_sent(kitchen: Kitchen) -> None:
    levels = (LEVEL, 0, LEVEL, 1, LEVEL, 2)
    record = kitchen.run(Plan(levels)).record
    assert record.levels == levels
    kitchen.check(levels)
    assert all(chunk.pieces_s == () for chunk in record.chunks)


def test_pieces_are_decoded_as_they_come(kitchen: Kitchen, in_pieces: list[int]) -> None:
    record = kitchen.run(Plan(LEVEL), rate_bps=4e6).record
    kitchen.check((LEVEL,) * N_CHUNKS)
    sizes = [chunk.bytes for chunk in record.chunks]
    assert sum(in_pieces) == sum(sizes)
    assert len(in_pieces) > 3 * N_CHUNKS
    for chunk in record.chunks:
        assert chunk.decode_start_s < chunk.last_byte_s  # type: ignore[operator]
        assert chunk.pieces_s[0][0] == chunk.decode_start_s
        assert chunk.pieces_s[-1][1] == chunk.decode_end_s
        assert all(a <= b for a, b in itertools.pairwise(itertools.chain.from_iterable(chunk.pieces_s)))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is done with chunks, in order: ("feed" or "finish", chunk)."""
    seen: list[tuple[str, int]] = []

    def note(name: str) -> None:
        work = getattr(IncomingChunk, name)

        def noting(incoming: Any, *given: Any) -> None:
            seen.append((name, incoming.chunk))
            work(incoming, *given)

        monkeypatch.setattr(IncomingChunk, name, noting)

    note("feed")
    note("finish")
    return seen


def test_the_next_chunk_is_launched_before_the_end_of_one_is_waited_for(
    kitchen: Kitchen, in_pieces: list[int], done: list[tuple[str, int]]
) -> None:
    engine, store, gate = kitchen.engine, kitchen.store, threading.Event()
    engine.open(store.manifest(CONTEXT), 0)
    data = [store.get_kv(f"{CONTEXT}/{chunk}", LEVEL) for chunk in (0, 1)]
    one, two = (engine.take(chunk, LEVEL, len(data[chunk])) for chunk in (0, 1))
    one.view[:], two.view[:] = data
    engine.submit(gate.wait)
    engine.on_bytes(one, len(data[0]))
    decoding = engine.submit(engine.decode, one)
    engine.on_bytes(two, 2 * buffers.FIRST_PIECE_BYTES)
    gate.set()
    step = decoding.result(60.0)
    assert done.index(("feed", 1)) < done.index(("finish", 0))
    engine.on_bytes(two, len(data[1]))
    later = engine.submit(engine.decode, two).result(60.0)
    assert len(step.pieces) == 2
    assert len(later.pieces) == 3
    one.release(), two.release()
    whole = torch.cat([kitchen.codec.decode(part) for part in data], dim=2)  # type: ignore[arg-type]
    torch.testing.assert_close(engine.context.cache.view(0, 2 * CHUNK_TOKENS).cpu(), whole)


def test_a_chunk_that_is_there_is_finished_before_pieces_that_wait(
    kitchen: Kitchen, in_pieces: list[int], done: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store, gate = kitchen.engine, kitchen.store, threading.Event()
    monkeypatch.setattr(engine, "_max_slots", 3)
    engine.open(store.manifest(CONTEXT), 0)
    data = [store.get_kv(f"{CONTEXT}/{chunk}", LEVEL) for chunk in range(3)]
    chunks = [engine.take(chunk, LEVEL, len(data[chunk])) for chunk in range(3)]
    engine.submit(gate.wait)
    for chunk, bytes_ in zip(chunks, data, strict=True):
        chunk.view[:] = bytes_
        engine.on_bytes(chunk, len(bytes_))
    decoding = engine.submit(engine.decode, chunks[0])
    gate.set()
    decoding.result(60.0)
    engine.submit(lambda: None).result(60.0)
    for chunk in chunks:
        chunk.release()
    fed = [chunk for what, chunk in done[: done.index(("finish", 0))] if what == "feed"]
    assert fed == [0, 1]


def test_nothing_is_decoded_early_without_overlap(kitchen: Kitchen, in_pieces: list[int]) -> None:
    record = kitchen.run(Plan(LEVEL), overlap=False).record
    kitchen.check((LEVEL,) * N_CHUNKS)
    last_byte_s = max(chunk.last_byte_s for chunk in record.chunks)  # type: ignore[type-var]
    assert all(chunk.decode_start_s >= last_byte_s for chunk in record.chunks)  # type: ignore[operator]


def test_a_slow_decoder_slows_the_link_down(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = kitchen.engine.decode

    def slowly(incoming: Any) -> Any:
        time.sleep(0.05)
        return decode(incoming)

    monkeypatch.setattr(kitchen.engine, "decode", slowly)
    chunks = kitchen.run(Plan(LEVEL)).record.chunks
    for before, after in zip(chunks, chunks[2:], strict=False):  # two slots
        assert after.request_s >= before.decode_end_s  # type: ignore[operator]
    assert chunks[1].request_s < chunks[0].decode_end_s  # type: ignore[operator]


def test_texts_take_no_slot(kitchen: Kitchen) -> None:
    """Four texts wait for the first chunk, which has a slot although all of them arrive before it."""

    class Backwards:
        def choose(self, obs: Observation) -> Choice:
            chunk = obs.remaining[-1]
            return Choice(TEXT if chunk >= 2 else LEVEL, chunk)

    record = kitchen.run(Backwards()).record
    assert record.levels == (LEVEL, LEVEL, TEXT, TEXT, TEXT, TEXT)
    assert not bool(kitchen.arrived().isnan().any())


@pytest.mark.parametrize("pieces", [False, True])
def test_damage_is_fetched_again_and_then_fails_the_session(
    kitchen: Kitchen, pieces: bool, request: pytest.FixtureRequest
) -> None:
    if pieces:
        request.getfixturevalue("in_pieces")
    record = kitchen.run(Plan(LEVEL), change=pipeline.damage(1)).record
    assert [chunk.attempts for chunk in record.chunks] == [1, 1, 2, 1, 1, 1]
    kitchen.check((LEVEL,) * N_CHUNKS)
    with pytest.raises(SessionFailed, match=r"chunk 2 failed 3 times, last: "):
        kitchen.run(Plan(LEVEL), change=pipeline.damage(3))
    kitchen.run(Plan(LEVEL))
    kitchen.check((LEVEL,) * N_CHUNKS)


@pytest.mark.parametrize("parts", [1, 2])
def test_pages_get_what_a_dense_cache_gets(kitchen: Kitchen, parts: int) -> None:
    paged = replace(kitchen, engine=ModelEngine(kitchen.model, pages_on=[kitchen.model.device] * parts))
    try:
        paged.engine.reserve(pipeline.TOKENS + 64)
        paged.run(Plan((LEVEL, TEXT, LEVEL, TEXT, LEVEL, LEVEL)))
        assert not bool(paged.arrived().isnan().any())
        paged.run(Plan(LEVEL))
        paged.check((LEVEL,) * N_CHUNKS)
    finally:
        paged.engine.close()


def test_slots_come_back() -> None:
    buffers_ = ChunkBuffers(streams_of(torch.device("cpu")))
    buffers_.open(even(n_chunks=3), 2)
    first, second = buffers_.take(0, 0, 100_000), buffers_.take(1, 2, 400_000)
    assert (len(first.view), len(second.view)) == (100_000, 400_000)
    first.view[:] = bytes(100_000)
    second.view[:] = b"\1" * 400_000
    assert not any(first.view)
    with pytest.raises(SpecError, match="no slot is free for chunk 2"):
        buffers_.take(2, 0, 100_000)
    assert len(buffers_.take(2, TEXT, 400).view) == 400
    first.release()
    first.release()
    again = buffers_.take(2, 1, 200_000)
    again.view[:] = b"\2" * 200_000
    assert set(second.view) == {1}, "slots do not overlap"
    with pytest.raises(SpecError, match="no slot is free"):
        buffers_.take(0, 0, 1)


def test_opening_a_context_forgets_the_slots_of_the_one_before() -> None:
    buffers_ = ChunkBuffers(streams_of(torch.device("cpu")))
    buffers_.open(even(n_chunks=3), 1)
    old = buffers_.take(0, 0, 100_000)
    buffers_.open(even(n_chunks=3), 1)
    old.release()
    buffers_.take(0, 0, 100_000)
    with pytest.raises(SpecError, match="no slot is free"):
        buffers_.take(1, 0, 100_000)


def test_a_load_is_measured_inside_and_outside() -> None:
    loop = GemvLoop(torch.device("cpu"))
    loop.start()
    time.sleep(0.1)
    rounds = loop.stop()
    assert rounds
    assert all(a.end_s <= b.start_s + 1e-3 for a, b in itertools.pairwise(rounds))
    made = [Round(float(t), t + (1.5 if t in (4, 5) else 1.0)) for t in (0, 1, 2, 4, 5.5, 8, 9)]
    made[4] = Round(5.5, 7.0)
    assert slowdown(made, 3.5, 7.5) == {"rounds": 2, "alone_s": 1.0, "beside_s": 1.5, "slowdown": 0.5}
    assert slowdown(made, 20.0, 30.0) == {}


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        (["meta", "cpu"], "must be the model's, cpu, not meta"),
        (["cpu"] * 99, "cannot share"),
        (["gpu"], "pages on gpu: "),
    ],
)
def test_devices_that_cannot_have_pages_are_refused(kitchen: Kitchen, devices: list[str], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        ModelEngine(kitchen.model, pages_on=devices)
