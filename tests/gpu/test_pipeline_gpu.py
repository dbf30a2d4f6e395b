"""The whole pipeline with the receiver on a CUDA device: the cache there is what the CPU decodes from the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kvstream.policies.api import TEXT  # noqa: E402
from kvstream.testbed.engine import buffers  # noqa: E402
from kvstream.testbed.engine.model import calculate_kv  # noqa: E402
from kvstream.testbed.engine.model_engine import ModelEngine  # noqa: E402
from kvstream.testbed.engine.streams import streams_of  # noqa: E402
from kvstream.testbed.receiver.background_load import GemvLoop, slowdown  # noqa: E402
from kvstream.testbed.session.record import SessionFailed  # noqa: E402
from tests.testbed import pipeline  # noqa: E402
from tests.testbed.pipeline import LEVEL, Kitchen, Plan  # noqa: E402

N_CHUNKS = -(-pipeline.TOKENS // pipeline.CHUNK_TOKENS)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    made = pipeline.make(tmp_path_factory.mktemp("store"), "cuda")
    yield made
    made.engine.close()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "PIECE_BYTES", 2048)
    monkeypatch.setattr(buffers, "FIRST_PIECE_BYTES", 1024)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_cache_that_arrives_is_the_one_that_was_sent(kitchen: Kitchen, overlap: bool) -> None:
    levels = (LEVEL, 0, LEVEL, 1, LEVEL, 2)
    record = kitchen.run(Plan(levels), rate_bps=4e7, overlap=overlap).record
    assert record.levels == levels
    kitchen.check(levels)
    for chunk in record.chunks:
        assert chunk.decode_start_s < chunk.decode_end_s <= record.ttft_s  # type: ignore[operator]


def test_text_is_recomputed_among_encoded_chunks(kitchen: Kitchen) -> None:
    record = kitchen.run(Plan((LEVEL, TEXT, LEVEL, TEXT, TEXT, LEVEL))).record
    assert record.levels == (LEVEL, TEXT, LEVEL, TEXT, TEXT, LEVEL)
    assert bool(kitchen.arrived().isfinite().all())
    kitchen.run(Plan(TEXT))
    exact = calculate_kv(kitchen.model, kitchen.tokens).cpu()
    torch.testing.assert_close(kitchen.arrived(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("gpus", [1, 2])
def test_pages_get_what_a_dense_cache_gets(kitchen: Kitchen, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA devices")
    devices = [torch.device("cuda", index) for index in range(gpus)]
    paged = replace(kitchen, engine=ModelEngine(kitchen.model, pages_on=devices))
    try:
        paged.engine.reserve(pipeline.TOKENS + 64)
        assert paged.run(Plan(LEVEL)).record.levels == (LEVEL,) * N_CHUNKS
        paged.check((LEVEL,) * N_CHUNKS)
    finally:
        paged.engine.close()


def test_damage_leaves_the_context_alive(kitchen: Kitchen) -> None:
    record = kitchen.run(Plan(LEVEL), change=pipeline.damage(1)).record
    assert [chunk.attempts for chunk in record.chunks] == [1, 1, 2, 1, 1, 1]
    kitchen.check((LEVEL,) * N_CHUNKS)
    with pytest.raises(SessionFailed, match=r"chunk 2 failed 3 times, last: "):
        kitchen.run(Plan(LEVEL), change=pipeline.damage(3))
    kitchen.run(Plan(LEVEL))
    kitchen.check((LEVEL,) * N_CHUNKS)


def test_the_devices_clock_is_the_sessions() -> None:
    import time

    streams = streams_of(torch.device("cuda"))
    before_s = time.monotonic()
    mark = streams.mark("model")
    streams.reach(mark)
    after_s = time.monotonic()
    assert before_s - 2e-4 <= streams.when(mark) <= after_s + 2e-4


def test_an_idle_device_does_not_slow_the_load() -> None:
    import time

    loop = GemvLoop(torch.device("cuda"))
    loop.start()
    time.sleep(0.3)
    rounds = loop.stop()
    middle = rounds[len(rounds) // 2].start_s
    assert abs(slowdown(rounds, middle, rounds[-1].end_s)["slowdown"]) < 0.05


def test_a_captured_prefill_gives_the_same_token(kitchen: Kitchen) -> None:
    kitchen.run(Plan(LEVEL))
    eager = kitchen.engine.prefill(list(pipeline.PROMPT))
    assert kitchen.engine.capture(pipeline.TOKENS, len(pipeline.PROMPT))
    assert kitchen.run(Plan(LEVEL)).token == eager.token
    assert kitchen.engine.prefill(list(pipeline.PROMPT)).token == eager.token
    kitchen.check((LEVEL,) * N_CHUNKS)
