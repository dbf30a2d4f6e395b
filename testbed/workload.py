"""Contexts with questions: passages of text with key-value lines between them, one token a byte.

A key-value line reads `line red-fox: REGISTER is <12345>`. A question repeats its beginning, up to `<`, after the
context; the answer is the number. The bundled models were trained on this format, so the share of right answers
tells whether a KV cache still holds what it should. No torch here: a context is bytes, and a byte is a token id.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from testbed.errors import SpecError

BUNDLED_CONTEXTS = Path(__file__).parent / "contexts"
ANSWER_DIGITS = 5

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
    """What is asked after a context, and the bytes that answer it right."""

    prompt: bytes
    answer: bytes


@dataclass(frozen=True)
class Context:
    """A text whose KV cache is reused, and questions whose answers stand in it. One token is one byte."""

    name: str
    text: bytes
    questions: tuple[Question, ...]
    source: str = ""

    @property
    def token_ids(self) -> list[int]:
        """The context's token ids: its bytes."""
        return list(self.text)

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
        """Read a context; SpecError says which file is wrong and what is missing in it."""
        try:
            record = json.loads(content)
            questions = tuple(Question(prompt.encode(), answer.encode()) for prompt, answer in record["questions"])
            context = cls(record["name"], record["text"].encode(), questions, record.get("source", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpecError(f"{where}: not a context ({error!r}): it needs name, text and questions") from error
        for prompt, answer in context.questions:
            if prompt + answer not in context.text:
                raise SpecError(f"{where}: the answer to {prompt.decode()!r} is not in the text")
        return context


def key_value_line(name: str, number: int) -> tuple[Question, bytes]:
    """The question about a line, and the line itself with its newline."""
    prompt = f"line {name}: REGISTER is <".encode()
    answer = f"{number:0{ANSWER_DIGITS}d}".encode()
    return Question(prompt, answer), prompt + answer + b">\n"


def make_context(seed: int, n_tokens: int, texts: Sequence[bytes], n_lines: int, name: str = "") -> Context:
    """A context of exactly `n_tokens` bytes: `n_lines` key-value lines at random line ends of passages of `texts`.

    The text comes from as many of `texts`, in random order and each from a random line on, as it takes. Questions
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
    """The contexts of a folder (`*.json`), sorted by file name; by default those shipped with kvstream."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SpecError(f"{folder}: no contexts (*.json) here")
    return [Context.from_json(file.read_text(encoding="utf-8"), str(file)) for file in files]
