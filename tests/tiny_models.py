"""Tokenizers and models made on the spot: small, deterministic, of the two families whose text rules differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT = [
    "def main(arguments): return the answer to the question, if there is one; otherwise raise an error.",
    "The quick brown fox jumps over the lazy dog while the other dogs sleep under the old tree.",
    "import asyncio, json, os  # these are the modules that this file needs\n\n\tfor name in names:\n\t\tprint(name)",
    "Numbers such as 1, 22, 333 and 4444 appear in texts, and so do 3.14159 and 10,000.",
    "你好世界 こんにちは世界 Привет мир ñandú über café naïve 🎉🚀👩‍👩‍👧",
]


def byte_level(folder: Path) -> Path:
    """A byte-level BPE tokenizer (as GPT-2, Llama 3 and Qwen have it) with special and ordinary added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    return _save(tokenizer, folder)


def sentencepiece_style(folder: Path) -> Path:
    """A tokenizer as Llama 2 and Mistral have it: ▁ for spaces, byte fallback, one space stripped at the start."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_pieces], show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT[:4] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # The trainer takes all given tokens for special ones; byte pieces are ordinary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] not in byte_pieces]
    return _save(Tokenizer.from_str(json.dumps(state)), folder)


def with_weights(folder: Path) -> Path:
    """Adds a two-layer Llama with random weights (float32, 2,048 positions) to a tokenizer's folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's CPU attention wants heads of 32 or more
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="float32",
        initializer_range=0.2,  # wide, so that greedy answers vary
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _save(tokenizer: Any, folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool>", " and so on"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder
