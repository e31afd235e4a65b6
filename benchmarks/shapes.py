"""Models with the shape of Qwen2.5 and nothing in them: a real config.json, random weights (`load_format: dummy`), a small
tokenizer made on the spot. Nothing is downloaded.

The configurations are those of the hub's Qwen2.5-0.5B, Qwen2.5-7B. The tokenizer knows each byte and as many filler words as
the vocabulary has places, and merges nothing: a prompt of n ASCII characters has n tokens, and any answer can be written as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    # What can be tried on a CPU: not a Qwen2.5, but of its kind.
    "nano": {
        **_QWEN25,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 4096,
        "bos_token_id": 4095,
        "eos_token_id": 4095,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "0.5b": {
        **_QWEN25,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        **_QWEN25,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def model_folder(shape: str, folder: Path) -> Path:
    """Write config.json and the tokenizer of `shape` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    size, end = config["vocab_size"], config["eos_token_id"]
    vocabulary = {char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for place in range(len(vocabulary), size):
        vocabulary["<|endoftext|>" if place == end else f"Ġw{place}"] = place
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": config["max_position_embeddings"],
            }
        )
    )
    return folder
