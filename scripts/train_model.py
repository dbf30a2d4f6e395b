"""Train the bundled byte-level Llama models and measure them.

    python scripts/corpus.py .corpus
    python scripts/train_model.py --variant bundled --seconds 330 --out testbed/engine/models/tiny-kv
    python scripts/train_model.py --evaluate testbed/engine/models/tiny-kv

Two kinds of sequence share a batch: plain text, and key-value lines between passages of text (the format of
`kvstream.testbed.workloads.contexts`) with questions at the end. Loss falls on every byte of text and on the
questions' answers, never on the numbers in the lines, which nothing predicts. Two thirds of the time goes to short
sequences with many lines, where retrieval is learnt, the rest to the full length. `--seconds` bounds the training
loop; the learning rate follows the clock, so a slower machine trains less but ends properly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import corpus

from kvstream.testbed.workloads.contexts import make_context

IGNORED, TEXT, ANSWER = 0, 1, 2
LONGEST_LINE = 43  # bytes of a key-value line, newline included
RETRIEVAL_LENGTHS = (512, 1_024, 2_048, 4_096)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: up to which share of the time, and the batch's shape in tokens."""

    until: float
    batch: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """Everything in which the training of two variants differs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    rope_theta: float
    retrieval_share: float
    answer_weight: float
    seed: int
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    phases: tuple[Phase, ...] = (Phase(0.6, 48, 2_048), Phase(1.0, 21, 4_608))
    max_positions: int = 8_192


RECIPES = {
    "bundled": Recipe(8, 320, 10, 5, 32, 896, 100_000.0, 1 / 3, 0.5, seed=1),
    "second": Recipe(6, 384, 8, 4, 64, 848, 10_000.0, 1 / 4, 0.4, seed=2),
    # A model of real proportions, 189 M parameters, to judge codecs by: learns in minutes on a GPU, and is not kept.
    "large": Recipe(
        16,
        1_024,
        8,
        4,
        128,
        2_816,
        10_000.0,
        1 / 4,
        0.4,
        seed=4,
        learning_rate=1e-3,
        warmup_steps=60,
        phases=(Phase(0.5, 32, 1_024), Phase(1.0, 16, 2_048)),
        max_positions=4_096,
    ),
    "smoke": Recipe(2, 64, 4, 2, 16, 128, 10_000.0, 1 / 3, 0.5, 3, phases=(Phase(0.6, 6, 512), Phase(1, 3, 1_024))),
}


def config_of(recipe: Recipe) -> LlamaConfig:
    """The Llama architecture of a recipe: one token per byte, no special tokens."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


class Batches(IterableDataset):
    """Endless batches of (tokens, marks), both uint8 [batch, length + 1]; a mark says which loss a token takes."""

    def __init__(self, text: bytes, recipe: Recipe, phase: Phase, seed: int) -> None:
        self.text, self.recipe, self.phase, self.seed = text, recipe, phase, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        draw = random.Random(f"{self.seed}-{self.phase.length}-{info.id if info else 0}")
        size = self.phase.length + 1
        n_retrieval = max(1, round(self.phase.batch * self.recipe.retrieval_share))
        while True:
            rows = [retrieval_row(draw, self.text, size) for _ in range(n_retrieval)]
            for _ in range(self.phase.batch - n_retrieval):
                start = draw.randrange(len(self.text) - size)
                rows.append((self.text[start : start + size], bytes([TEXT]) * size))
            tokens = np.frombuffer(b"".join(row[0] for row in rows), np.uint8).reshape(-1, size)
            marks = np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(-1, size)
            yield torch.from_numpy(tokens.copy()), torch.from_numpy(marks.copy())


def retrieval_row(draw: random.Random, text: bytes, size: int) -> tuple[bytes, bytes]:
    """One training sequence of `size` bytes: a context of `make_context`, then questions with their answers."""
    n_lines = round(math.exp(draw.uniform(math.log(4), math.log(size / 60))))
    n_asked = min(n_lines, draw.randint(4, max(4, size // 120)))
    room = size - n_asked * LONGEST_LINE
    n_lines = min(n_lines, room // LONGEST_LINE)
    start = draw.randrange(len(text) - 2 * size)
    context = make_context(draw.getrandbits(48), room, [text[start : start + 2 * size]], n_lines)
    marks = bytearray([TEXT]) * room
    for prompt, _ in context.questions:
        at = context.text.find(prompt)
        end = context.text.index(b"\n", at) + 1
        marks[at:end] = bytes(end - at)
    asked = draw.sample(context.questions, min(n_asked, n_lines))
    tail, tail_marks = bytearray(), bytearray()
    for prompt, answer in asked:
        tail += prompt + answer + b">\n"
        tail_marks += bytes(len(prompt)) + bytes([ANSWER]) * (len(answer) + 1) + bytes(1)
    padding = max(0, size - room - len(tail))
    tokens = context.text + bytes(tail) + b"\n" * padding
    return tokens[:size], (bytes(marks) + bytes(tail_marks) + bytes(padding))[:size]


def losses(model: Any, tokens: torch.Tensor, marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy in nats over text bytes and over answer bytes of a batch [batch, length + 1]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    kinds = marks[:, 1:].flatten()
    text, answer = (kinds == TEXT).float(), (kinds == ANSWER).float()
    return (nats * text).sum() / text.sum().clamp(min=1), (nats * answer).sum() / answer.sum().clamp(min=1)


def train(recipe: Recipe, text: bytes, seconds: float, device: str, workers: int) -> LlamaForCausalLM:
    """Train for `seconds`, compilation included, and return the model in float32 on `device`."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM._from_config(config_of(recipe), attn_implementation="sdpa").to(device)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    if device == "cuda":  # one graph for all layers: a tenth of the whole model's compile time, and no slower
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    plain = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=device == "cuda")
    started = time.monotonic()
    step = tokens_seen = 0
    for phase in recipe.phases:
        batches = iter(
            DataLoader(
                Batches(text, recipe, phase, recipe.seed),
                batch_size=None,
                num_workers=workers,
                pin_memory=device == "cuda",
                prefetch_factor=8 if workers else None,
            )
        )
        while (share := (time.monotonic() - started) / seconds) < phase.until:
            rate = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * max(0.01, 1 - share)
            for group in optimiser.param_groups:
                group["lr"] = rate
            tokens, marks = (part.to(device, non_blocking=True) for part in next(batches))
            with torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext():
                text_loss, answer_loss = losses(model, tokens.long(), marks)
            (text_loss + recipe.answer_weight * answer_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            tokens_seen += phase.batch * phase.length
            if step % 200 == 0 or step in (1, 20):
                bits = text_loss.item() / math.log(2)
                line = f"{bits:.3f} bit/byte, answers {answer_loss.item():.4f} nats, rate {rate:.1e}"
                print(f"{time.monotonic() - started:6.1f} s  step {step:5}  length {phase.length}  {line}", flush=True)
            step += 1
        del batches
    print(f"{step:,} steps, {tokens_seen:,} tokens", flush=True)
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write bf16 safetensors in shards of at most 12 MB, the configuration, and a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    copy: Any = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(do_sample=False, max_new_tokens=16)
    copy.to(torch.bfloat16).save_pretrained(folder, max_shard_size="11MB")
    write_tokenizer(folder, model.config.max_position_embeddings)


def write_tokenizer(folder: Path, longest: int) -> None:
    """A byte-level tokenizer with no merges and no special tokens: the id of a byte is its value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))  # the byte-level alphabet gives the other bytes the next free characters
    vocabulary = {chr(byte if byte in printable else next(shifted)): byte for byte in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def bits_per_byte(model: Any, text: bytes, device: str, length: int = 2_048, windows: int = 96) -> float:
    """Cross-entropy on evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(text) - length - 1, windows).astype(int)
    rows = torch.tensor(np.stack([np.frombuffer(text, np.uint8, length + 1, start) for start in starts])).long()
    total = 0.0
    for part in rows.split(8):
        with torch.inference_mode():
            text_loss, _ = losses(model, part.to(device), torch.full_like(part, TEXT).to(device))
        total += text_loss.item() * len(part)
    return total / len(rows) / math.log(2)


def right_answers(model: Any, context: bytes, questions: Sequence[tuple[bytes, bytes]], device: str) -> int:
    """How many questions greedy decoding answers correctly with the exact cache of the context (teacher-forced)."""
    with torch.inference_mode():
        ids = torch.tensor([list(context)], device=device)
        cache = model(input_ids=ids, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(questions))
        rows = [prompt + answer for prompt, answer in questions]
        longest = max(map(len, rows))
        asked = torch.tensor([list(row.ljust(longest, b"\n")) for row in rows], device=device)
        best = model(input_ids=asked, past_key_values=cache, use_cache=True).logits.argmax(-1).cpu()
    right = 0
    for row, (prompt, answer) in enumerate(questions):
        right += bytes(best[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist()) == answer
    return right


def evaluate(folder: Path, heldout: bytes, device: str, contexts: int) -> dict:
    """Held-out bit/byte, and the share of questions answered correctly at each context length; prints both."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    report: dict = {"bits_per_byte": round(bits_per_byte(model, heldout, device), 4), "retrieval": {}}
    print(f"held-out text: {report['bits_per_byte']} bit/byte", flush=True)
    texts = [text for text in heldout.split(b"\0") if text.isascii()]
    for length in RETRIEVAL_LENGTHS:
        right = asked = 0
        for seed in range(contexts):
            context = make_context(seed, length, texts, n_lines=max(4, length // 128))
            right += right_answers(model, context.text, context.questions, device)
            asked += len(context.questions)
        report["retrieval"][length] = [right, asked]
        print(f"retrieval at {length:5} tokens: {right}/{asked} = {right / asked:.2%}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variant", choices=RECIPES, default="bundled")
    parser.add_argument("--seconds", type=float, default=330.0, help="length of the training loop")
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"), help="folder written by corpus.py")
    parser.add_argument("--out", type=Path, help="where the model is written")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure this model instead of training one")
    parser.add_argument("--contexts", type=int, default=12, help="contexts per length in the evaluation")
    parser.add_argument("--workers", type=int, default=12, help="processes that prepare batches")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heldout = corpus.load(options.corpus, "heldout")
    if options.evaluate:
        evaluate(options.evaluate, heldout, device, options.contexts)
        return
    if options.out is None:
        parser.error("--out DIR is needed to train")
    text = corpus.load(options.corpus, "train")
    model = train(RECIPES[options.variant], text, options.seconds, device, options.workers)
    save(model, options.out)
    report = evaluate(options.out, heldout, device, options.contexts)
    (options.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
