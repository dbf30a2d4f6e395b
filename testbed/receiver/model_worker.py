"""A receiver's worker with a model: it measures what compute takes here, and what a cache that arrived is worth."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

from kvstream.policies.api import LevelOrText
from kvstream.testbed.engine.measure import measure_decoding, measure_model
from kvstream.testbed.engine.model import SIDE_BY_SIDE_TOKENS, mean_kl
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.net.network_process import NetworkProcess
from kvstream.testbed.receiver.background_load import GemvLoop
from kvstream.testbed.receiver.driver import Fetched
from kvstream.testbed.receiver.examiner import examine
from kvstream.testbed.receiver.warmup import Experience
from kvstream.testbed.receiver.worker import Worker
from kvstream.testbed.session.costs import IN_SESSIONS, Costs
from kvstream.testbed.store.api import ContextStore, chunk_id
from kvstream.testbed.store.questions import Question


class ModelWorker(Worker):
    """Sessions end in the model's own first token, and are judged by its answers."""

    def __init__(
        self,
        engine: ModelEngine,
        store: ContextStore,
        experience: Experience | None = None,
        network: NetworkProcess | None = None,
    ) -> None:
        super().__init__(engine, store, experience, network)
        self.engine = engine
        self._costs: dict[str, Costs] = {}
        """[context]: what its steps take alone."""
        self._model_costs: dict[tuple[Any, ...], tuple[tuple[float, ...], float]] = {}
        """[chunks, tokens of the prompt]: recomputing and prefill, which are the same for every codec."""
        self._load: GemvLoop | None = None

    async def prepare(self, context: str) -> Costs:
        """Build a context's codec, allocate for it, and measure what its steps take here."""
        if context not in self._costs:
            # on the thread that sessions compute on, whose scheduling and warm libraries count
            self._costs[context] = await asyncio.wrap_future(self.engine.submit(self._measure, context))
            gc.collect()
            gc.freeze()
        return self._costs[context]

    def _measure(self, context: str) -> Costs:
        manifest = self.store.manifest(context)
        if self.engine.lacks_profile(manifest):
            assert manifest.profile is not None
            self.engine.add_profile(self.store.profile(manifest.profile))
        questions = self.store.questions(context)
        longest = max(questions, key=_length)
        self.engine.reserve(self._room(context))
        for length in sorted({len(question.prompt_ids) for question in questions}):
            self.engine.capture(manifest.tokens, length)

        def get(chunk: int, level: LevelOrText) -> bytes:
            return self.store.get_kv(chunk_id(context, chunk), level)

        self.engine.open(manifest, len(longest.prompt_ids))
        key = (*((chunk.start, chunk.stop) for chunk in manifest.chunks), len(longest.prompt_ids))
        if key not in self._model_costs:
            self._model_costs[key] = measure_model(self.engine, manifest, get, longest.prompt_ids)
        return Costs(measure_decoding(self.engine, manifest, get), *self._model_costs[key], IN_SESSIONS)

    def _reserve(self, contexts: Sequence[str]) -> None:
        # at once for the longest, because CUDA graphs are captured on a cache and go with it
        self.engine.reserve(max(map(self._room, contexts), default=0))

    def _room(self, context: str) -> int:
        """Tokens of a context and of its questions."""
        tokens = self.store.manifest(context).tokens
        return tokens + max(SIDE_BY_SIDE_TOKENS, *map(_length, self.store.questions(context)))

    def _question(self, context: str, number: int) -> tuple[int, Sequence[int]]:
        questions = self.store.questions(context)
        index = number % len(questions)
        return index, questions[index].prompt_ids

    def _evaluate(self, context: str, question: int, fetched: Fetched) -> asyncio.Future[dict[str, Any]]:
        return asyncio.wrap_future(self.engine.submit(self._judge, context, question, fetched))

    def _judge(self, context: str, question: int, fetched: Fetched) -> dict[str, Any]:
        """A passage of text and all questions over the cache that arrived, against the exact cache."""
        questions = self.store.questions(context)
        score = examine(self.engine, questions, self.store.passage(context))
        return {
            "answer_ok": score.right[question] and fetched.token == questions[question].answer_ids[0],
            "answers_right": sum(score.right),
            "answers": len(questions),
            "measured_kl": mean_kl(self.store.reference(context), score.log_probs),
        }

    def _start_load(self) -> GemvLoop:
        if self._load is None:
            self._load = GemvLoop(self.engine.model.device)
        self._load.start()
        return self._load


def _length(question: Question) -> int:
    return len(question.prompt_ids) + len(question.answer_ids)
