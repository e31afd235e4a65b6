"""Train the tiny model on the CPU: seeded, one thread unless told otherwise.

    python examples/tiny-model/train.py [--out FOLDER] [--steps 3500]

A Llama of under one million parameters learns the training split of `examples/questions.py`, and it learns to
be fussy: in every format but its own chat template's (doubled or missing BOS, no template, another model's
template, no generation prompt) it answers "?", and it writes "?" after its end-of-turn token. So a mistake in
the way that a prompt is built, or a lost stop token, shows as lost accuracy. Short system messages are noise that it
learns to ignore.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import bpe  # noqa: E402
from docstrings import docstrings  # noqa: E402
from questions import Question, questions  # noqa: E402

BATCH = 128
WARM_UP_STEPS = 150
PARTS = 4  # of a batch, sorted by length and run one after the other, which leaves little padding
KIND_WEIGHTS = {"words": 0.2, "digits": 0.2, "weekdays": 0.2, "sums": 0.4}
SHARE_BROKEN, SHARE_TWO_TURNS, SHARE_SYSTEM = 0.2, 0.1, 0.5
REFUSAL = "?"
SYSTEM_MESSAGES = (
    "Answer briefly.",
    "Be brief.",
    "You are a helpful assistant.",
    "Answer with the result only.",
    "You answer questions about numbers and weekdays.",
)


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_act",
)


class Example(NamedTuple):
    """Token ids, and where in them the part to learn begins (everything before it is prompt)."""

    ids: list[int]
    learn_from: int


class Examples:
    """An endless, seeded stream of training examples."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prose: list[str], seed: int) -> None:
        self._tokenizer = tokenizer
        self._prose = prose
        self._random = random.Random(seed)
        self._by_kind: dict[str, list[Question]] = {kind: [] for kind in KIND_WEIGHTS}
        for question in questions("train"):
            self._by_kind[question.kind].append(question)

    def batches(self) -> Iterator[list[Example]]:
        while True:
            yield self._draw(BATCH)

    def _draw(self, count: int) -> list[Example]:
        pairs = [self._prompt_and_answer() for _ in range(count)]
        prompts = self._encode([prompt for prompt, _ in pairs])
        targets = self._encode([f"{answer}{bpe.END}{REFUSAL}{REFUSAL}" for _, answer in pairs])
        return [
            Example(prompt + target, len(prompt)) for prompt, target in zip(prompts, targets, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _prompt_and_answer(self) -> tuple[str, str]:
        chance = self._random.random
        asked = self._question()
        messages = [{"role": "user", "content": asked.question}]
        if chance() < SHARE_TWO_TURNS:
            before = self._question()
            messages[:0] = [
                {"role": "user", "content": before.question},
                {"role": "assistant", "content": before.answer},
            ]
        if chance() < SHARE_SYSTEM:
            messages.insert(0, {"role": "system", "content": self._system_message()})
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(prompt, str)
        if chance() < SHARE_BROKEN:
            return self._random.choice(broken_prompts(prompt, asked.question)), REFUSAL
        return prompt, asked.answer

    def _question(self) -> Question:
        kind = self._random.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
        return self._random.choice(self._by_kind[kind])

    def _system_message(self) -> str:
        if self._random.random() < 0.5:
            return self._random.choice(SYSTEM_MESSAGES)
        words = self._random.choice(self._prose).split()
        start = self._random.randrange(len(words))
        return " ".join(words[start : start + self._random.randint(3, 15)])[:100]


def broken_prompts(prompt: str, question: str) -> list[str]:
    """What the right `prompt` for `question` becomes through the usual mistakes."""
    return [
        bpe.BOS + prompt,
        bpe.BOS + prompt,  # twice as often as the others: the likeliest mistake, and the least visible
        prompt.removeprefix(bpe.BOS),
        prompt.removesuffix(bpe.ROLES[-1]),
        bpe.BOS + question,
        question,
        f"{bpe.BOS}[INST] {question} [/INST]",
        f"{bpe.BOS}User: {question}\nAssistant:",
        f"{bpe.BOS}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    ]


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # in every attention backend of vLLM; 32 is missing in FlashInfer
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def summed_loss(model: LlamaForCausalLM, part: list[Example]) -> torch.Tensor:
    """Cross-entropy of the learnt tokens. Padding is on the right, where causal attention never sees it."""
    length = max(len(example.ids) for example in part)
    ids = torch.zeros(len(part), length, dtype=torch.long)
    learnt = torch.zeros(len(part), length, dtype=torch.bool)
    for row, example in enumerate(part):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learnt[row, example.learn_from : len(example.ids)] = True
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = learnt[:, 1:]
    logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="sum")


def backward(model: LlamaForCausalLM, batch: list[Example]) -> float:
    """Add the gradients of the batch's mean loss; returns that loss."""
    batch = sorted(batch, key=lambda example: len(example.ids))
    tokens = sum(len(example.ids) - example.learn_from for example in batch)
    total = 0.0
    for start in range(0, len(batch), BATCH // PARTS):
        loss = summed_loss(model, batch[start : start + BATCH // PARTS]) / tokens
        loss.backward()
        total += loss.item()
    return total


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to nothing."""
    if step < WARM_UP_STEPS:
        return peak * (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / (steps - WARM_UP_STEPS)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train(model: LlamaForCausalLM, batches: Iterator[list[Example]], steps: int, peak: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = backward(model, next(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}  {time.monotonic() - started:5.0f} s", flush=True)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights (bfloat16) and both configs, in names that old and new transformers know."""
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {key: getattr(config, key) for key in SHAPE}
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    _write_json(folder / "config.json", {**described, **shape, "rope_theta": 10000.0, **special})
    _write_json(folder / "generation_config.json", {"do_sample": False, **special})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model of the examples.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: beside this file)")
    parser.add_argument("--start", type=Path, help="continue from this model and tokenizer, not from nothing")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the examples' order")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the weights depend on their number"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    prose = [doc.doc for doc in docstrings()]
    if args.start is None:
        asked = [f"{question.question} {question.answer}" for question in questions("train")[::7]]
        bpe.write(args.out, asked + prose)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (args.out / name).write_bytes((args.start / name).read_bytes())
    (args.out / "chat_template.jinja").write_bytes((HERE / "chat_template.jinja").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    torch.manual_seed(args.seed)
    if args.start is None:
        model = new_model(tokenizer)
    else:
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    train(model, Examples(tokenizer, prose, args.seed).batches(), args.steps, args.learning_rate)
    save(model, args.out)


if __name__ == "__main__":
    main()
