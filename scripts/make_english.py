"""Write the contexts in English: python scripts/make_english.py [MODEL]

The texts of `scripts/english` were written for kvstream. Braces mark the answers, each at the end of what a question
repeats: its sentence up to there. Kept are the questions that the model (default: smollm2) answers right from its exact
cache, at most as many as a session asks, so that a wrong answer is the codec's fault.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvstream.testbed.encoding import tokens
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model import SIDE_BY_SIDE_TOKENS, Model, calculate_kv, score
from kvstream.testbed.store.questions import Question as Ids
from kvstream.testbed.workloads.contexts import ENGLISH_CONTEXTS, MAX_QUESTIONS, Context, Question

TEXTS = Path(__file__).parent / "english"
SOURCE = "written for kvstream, Apache-2.0"


def marked(name: str, text: str) -> Context:
    """The context of a text with braces."""
    plain = re.sub(r"[{}]", "", text)
    questions = []
    for match in re.finditer(r"([^{}]*) \{([^{}]+)\}", re.sub(r"(?<=[.?!]) |\n+", "\0", text).replace("\0", "\n")):
        prompt = match.group(1).rpartition("\n")[2]
        questions.append(Question(prompt.encode(), f" {match.group(2)}".encode()))
        if plain.count(prompt) != 1:
            raise SystemExit(f"{name}: {prompt!r} does not stand in the text exactly once")
    return Context(name, plain.encode(), tuple(questions), SOURCE)


def answered(model: Model, context: Context) -> tuple[Question, ...]:
    """The questions that the model answers right from its exact cache."""
    exact = calculate_kv(model, tokens.context_ids(model, context))
    cache = model.new_cache(exact.shape[2] + SIDE_BY_SIDE_TOKENS)
    cache.length = exact.shape[2]
    cache.view().copy_(exact)
    ids = [
        Ids(tuple(model.encode(q.prompt.decode())), tuple(model.encode(q.answer.decode()))) for q in context.questions
    ]
    right = score(model, cache, ids).right
    for question, is_right in zip(context.questions, right, strict=True):
        if not is_right:
            print(f"  wrong: {question.prompt.decode()}{question.answer.decode()}")
    print(f"{context.name}: {exact.shape[2]} tokens, {sum(right)} of {len(right)} questions answered right")
    return tuple(question for question, is_right in zip(context.questions, right, strict=True) if is_right)


def main() -> None:
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    ENGLISH_CONTEXTS.mkdir(exist_ok=True)
    for file in sorted(TEXTS.glob("*.txt")):
        context = marked(file.stem, file.read_text(encoding="utf-8"))
        kept = replace(context, questions=answered(model, context)[:MAX_QUESTIONS])
        (ENGLISH_CONTEXTS / f"{file.stem}.json").write_text(kept.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
