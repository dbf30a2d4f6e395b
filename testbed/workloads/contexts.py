"""Contexts with questions: a question repeats the beginning of something that the context says, the answer goes on.

Two kinds come with kvstream. In passages of text stand key-value lines such as `line red-fox: REGISTER is <12345>`; a
question goes up to `<`, and the number is the answer. The bundled models, which take a byte for a token, were trained
on them. In English prose a sentence states a fact, which a model of the language answers. Where the exact cache gives
the right answers, their share tells whether a cache still holds what it should. No torch and no tokenizer here: a
context is UTF-8.
"""

from __future__ import annotations

import json
import random
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_json
from kvstream.traces.grammar import brief

BUNDLED_CONTEXTS = Path(__file__).parent / "data" / "contexts"
"""Text with key-value lines."""
ENGLISH_CONTEXTS = Path(__file__).parent / "data" / "contexts-english"
"""Prose, whose questions SmolLM2 answers right from its exact cache (`scripts/make_english.py`)."""
ANSWER_DIGITS = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
"""Part of ids and of file names."""
MAX_QUESTIONS = 16
"""Every session asks them all after its first token, which takes a while on two cores."""

_ADJECTIVES = (
    "red blue green amber white black grey silver golden purple pink brown crimson azure ivory olive "
    "quiet loud brave calm eager gentle happy proud shy swift slow bold clever kind keen lively "
    "cold warm dry damp frozen hot mild windy rainy sunny misty stormy dusty icy dark bright "
    "big small tall short wide narrow round square flat steep heavy light thick thin long deep "
    "old young new ancient early late modern rapid steady hidden"
)
_NOUNS = (
    "fox owl bear wolf hare lynx crow swan otter badger falcon heron raven robin sparrow turtle "
    "river lake hill valley forest meadow island canyon glacier desert harbor bridge tower castle garden temple "
    "apple pear plum cherry lemon mango peach grape melon olive walnut almond ginger pepper onion carrot "
    "anchor hammer needle lantern mirror ladder basket barrel button candle kettle pencil ribbon saddle trumpet violin "
    "comet planet meteor nebula quasar rocket engine piston turbine magnet"
)
_FIRST, _SECOND = _ADJECTIVES.split(), _NOUNS.split()


class Question(NamedTuple):
    """A question about a context, and the bytes of the right answer."""

    prompt: bytes
    answer: bytes


@dataclass(frozen=True)
class Context:
    """A text whose KV cache is reused, and questions whose answers it contains."""

    name: str
    text: bytes
    questions: tuple[Question, ...]
    source: str = ""

    def to_json(self) -> str:
        """The form in which contexts are shipped; `from_json` reads it back."""
        record = {
            "name": self.name,
            "source": self.source,
            "text": self.text.decode(),
            "questions": [[question.prompt.decode(), question.answer.decode()] for question in self.questions],
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: str, where: str = "context") -> Context:
        """Read a context. Raises SpecError naming the file and what is missing in it."""
        try:
            record = parse_json(content, "context")
            questions = tuple(Question(prompt.encode(), answer.encode()) for prompt, answer in record["questions"])
            context = cls(record["name"], record["text"].encode(), questions, record.get("source", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {brief(str(error))}"
            raise SpecError(f"{where}: not a context ({why}): it needs name, text and questions") from error
        if not isinstance(context.name, str) or not _NAME.fullmatch(context.name):
            raise SpecError(f"{where}: name {reprlib.repr(context.name)} must be 1 to 80 letters, digits, - and _")
        if not context.text:
            raise SpecError(f"{where}: the text is empty")
        for prompt, answer in context.questions:
            if prompt + answer not in context.text:
                raise SpecError(f"{where}: the answer to {brief(prompt.decode())} is not in the text")
        return context


def key_value_line(name: str, number: int) -> tuple[Question, bytes]:
    """The question about a line, and the line itself with its newline."""
    prompt = f"line {name}: REGISTER is <".encode()
    answer = f"{number:0{ANSWER_DIGITS}d}".encode()
    return Question(prompt, answer), prompt + answer + b">\n"


def make_context(seed: int, n_tokens: int, texts: Sequence[bytes], n_lines: int, name: str = "") -> Context:
    """A context of exactly `n_tokens` bytes: `n_lines` key-value lines at random line ends of passages of `texts`.

    The text comes from as many of `texts` as needed, in random order and each from a random line on. Questions
    are in the order of their lines. Equal arguments give equal contexts. Raises SpecError if the lines
    do not fit into `n_tokens` or the texts are too short.
    """
    draw = random.Random(seed)
    if not 0 <= n_lines <= len(_FIRST) * len(_SECOND):
        raise SpecError(f"{n_lines} key-value lines: there are {len(_FIRST) * len(_SECOND)} names")
    names = draw.sample(range(len(_FIRST) * len(_SECOND)), n_lines)
    pairs = [
        key_value_line(
            f"{_FIRST[index // len(_SECOND)]}-{_SECOND[index % len(_SECOND)]}", draw.randrange(10**ANSWER_DIGITS)
        )
        for index in names
    ]
    room = n_tokens - sum(len(line) for _, line in pairs)
    if room < 0:
        raise SpecError(f"{n_lines} key-value lines need {n_tokens - room} bytes, the context has {n_tokens}")
    passage = _passage(draw, texts, room)
    ends = [at + 1 for at, byte in enumerate(passage) if byte == 0x0A] or [0]
    cuts = sorted(draw.choices([0, *ends], k=n_lines))
    pieces = []
    start = 0
    for cut, (_, line) in zip(cuts, pairs, strict=True):
        pieces += [passage[start:cut], line]
        start = cut
    pieces.append(passage[start:])
    return Context(name, b"".join(pieces), tuple(question for question, _ in pairs))


def _passage(draw: random.Random, texts: Sequence[bytes], n_bytes: int) -> bytes:
    """Exactly `n_bytes` of text that ends with a newline, from randomly chosen places of `texts`."""
    if n_bytes == 0:
        return b""
    passage = b""
    for text in draw.sample(texts, len(texts)):
        latest = max(0, len(text) - (n_bytes - len(passage)))
        start = text.rfind(b"\n", 0, draw.randint(0, latest)) + 1
        passage += text[start : start + n_bytes - len(passage)]
        if len(passage) == n_bytes:
            return passage[:-1] + b"\n"
        passage = passage.rstrip(b"\n") + b"\n"
    raise SpecError(f"the texts hold {sum(map(len, texts))} bytes, the context needs {n_bytes} of them")


def load_contexts(folder: Path = BUNDLED_CONTEXTS) -> list[Context]:
    """The contexts of a folder (`*.json`), sorted by file name; by default those with key-value lines."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SpecError(f"{folder}: no contexts (*.json) here")
    return [Context.from_json(file.read_text(encoding="utf-8"), str(file)) for file in files]


def shipped_contexts() -> dict[str, Context]:
    """Every context that comes with kvstream, by name."""
    return {
        context.name: context for folder in (BUNDLED_CONTEXTS, ENGLISH_CONTEXTS) for context in load_contexts(folder)
    }


def find_contexts(names: Sequence[str]) -> list[Context]:
    """Contexts by the name of a shipped one or the path of a JSON file. Raises SpecError."""
    shipped = shipped_contexts()
    found = []
    for name in names:
        if name in shipped:
            found.append(shipped[name])
        elif Path(name).is_file():
            try:
                found.append(Context.from_json(Path(name).read_text(encoding="utf-8-sig"), name))
            except UnicodeDecodeError as error:
                raise SpecError(f"{name}: not a context, which must be JSON in UTF-8 ({error})") from None
        else:
            raise SpecError(f"unknown context {brief(name)}; choose from {', '.join(shipped)}, or give a JSON file")
    return found


def asked(questions: Sequence[Question]) -> Sequence[Question]:
    """The questions that a session asks: at most MAX_QUESTIONS, spread over the whole context."""
    step = max(1, -(-len(questions) // MAX_QUESTIONS))
    return questions[::step]
