"""Tokenizers and models made on the spot: small, deterministic, of the two families whose text rules differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
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
    from transformers import AutoTokenizer, LlamaForCausalLM

    config = small_llama(AutoTokenizer.from_pretrained(folder), max_position_embeddings=2048)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def small_llama(tokenizer: Any, **config: Any) -> Any:
    """The configuration of a two-layer Llama (float32) for this tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's CPU attention wants heads of 32 or more
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="float32",
        initializer_range=0.2,  # wide, so that greedy answers vary
        **config,
    )


#: Of models that reason and call tools; each is one token, and none is special, as Qwen3 has them.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def thinking_tokenizer(folder: Path) -> Path:
    """`byte_level` with `MARKERS`, and a chat template that shows the names of tools."""
    from transformers import AutoTokenizer

    byte_level(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(MARKERS))
    tokenizer.chat_template = (
        "{% for tool in tools or () %}[{{ tool.function.name }}]{% endfor %}"
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}<think>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def thinking_model(folder: Path, ends: float = 0.2) -> Path:
    """A model on `thinking_tokenizer` that says any token, but `</think>` each time with this probability.

    Its layers add nothing, and the first dimension is the same for all tokens: there the head has a bias for each.
    """
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with_weights(thinking_tokenizer(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    mark = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("</think>")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 10.0
        said = model.model.norm(model.model.embed_tokens.weight)[:, 0].mean()
        head = model.lm_head.weight
        head.zero_()
        head[mark, 0] = math.log(len(head) * ends / (1 - ends)) / said
    model.save_pretrained(folder)
    return folder


def embedding_model(folder: Path) -> Path:
    """A two-layer Llama without a head and with random weights; its tokenizer has a chat template, as chat models' have."""
    from transformers import LlamaModel

    _pooling(folder, LlamaModel)
    template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def classifier(folder: Path, labels: Sequence[str]) -> Path:
    """A two-layer Llama with random weights and a head for these classes."""
    from transformers import LlamaForSequenceClassification

    return _pooling(folder, LlamaForSequenceClassification, id2label=dict(enumerate(labels)), pad_token_id=0)


def _pooling(folder: Path, architecture: Any, **config: Any) -> Path:
    """Adds a byte-level tokenizer and a small Llama of this architecture (float32, 256 positions)."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_level(folder))
    torch.manual_seed(0)
    architecture(small_llama(tokenizer, max_position_embeddings=256, **config)).save_pretrained(folder)
    return folder


#: Of a LoRA adapter: every kind of matrix that vLLM packs (q, k and v; gate and up) or leaves alone.
_ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_RANK, _ALPHA = 4, 8


def lora_adapter(model: Path, folder: Path, *, extra_rows: int = 0) -> Path:
    """A random LoRA adapter for a model as PEFT saves it, which changes many answers. `extra_rows`: more than the matrices have."""
    import torch
    from safetensors.torch import save_file

    dice = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in _weights(model).items():
        if any(kind in name for kind in _ADAPTED):
            rows, columns = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(_RANK, columns, generator=dice) / columns**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows + extra_rows, _RANK, generator=dice) * 0.3
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_ADAPTED),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(model: Path, adapter: Path, folder: Path) -> Path:
    """The model with the adapter in its weights (float32): W + alpha/r · B·A."""
    weights = {name: weight.float() for name, weight in _weights(model).items()}
    deltas = _weights(adapter)
    for name in [name for name in deltas if ".lora_A." in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        weights[target] += _ALPHA / _RANK * (deltas[name.replace(".lora_A.", ".lora_B.")] @ deltas[name])
    return _copy(model, folder, weights, {"torch_dtype": "float32"})


def quantised(model: Path, folder: Path, kind: str) -> Path:
    """The model with its linear layers quantised as `kind` has it, rounded to the nearest: a checkpoint of this format, not a good one."""
    weights: dict[str, Any] = {}
    for name, weight in _weights(model).items():
        if "_proj." in name:
            parts = _QUANTISED[kind](weight.float())
            weights |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        else:
            weights[name] = weight
    return _copy(model, folder, weights, {"quantization_config": _QUANTISATION[kind]})


_GROUP = 32  # input columns that share a scale
_LEVELS = 2  # on each side of zero, fewer than there is room for: so coarse that some answers change


def _int8_by_channel(weight: Any) -> dict[str, Any]:
    import torch

    scale = weight.abs().amax(1, keepdim=True) / _LEVELS
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _int4_by_group(weight: Any) -> tuple[Any, Any]:
    """Small integers [rows, columns], and their scales [rows, groups]."""
    grouped = weight.unflatten(1, (-1, _GROUP))
    scale = grouped.abs().amax(2, keepdim=True) / _LEVELS
    return (grouped / scale).round().int().flatten(1), scale.squeeze(2)


def _packed(values: Any, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Any:
    """Eight numbers of 0 to 15 along `dim` in each int32, the first of `order` in its lowest bits."""
    import torch

    eights = values.long().unflatten(dim, (-1, 8)).movedim(dim + 1 if dim >= 0 else dim, -1)
    words = sum(eights[..., each] << (4 * place) for place, each in enumerate(order))
    return (words - ((words >> 31) << 32)).to(torch.int32).contiguous()


def _int4_packed(weight: Any) -> dict[str, Any]:
    import torch

    values, scale = _int4_by_group(weight)
    return {
        "weight_packed": _packed(values + 8, 1),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _gptq(weight: Any) -> dict[str, Any]:
    import torch

    values, scale = _int4_by_group(weight)
    rows, columns = weight.shape
    zeros = torch.full((columns // _GROUP, rows), 7)  # this format keeps zero points less one
    return {
        "qweight": _packed(values.T + 8, 0),
        "qzeros": _packed(zeros, 1),
        "scales": scale.T.half().contiguous(),
        "g_idx": (torch.arange(columns) // _GROUP).int(),
    }


def _awq(weight: Any) -> dict[str, Any]:
    import torch

    values, scale = _int4_by_group(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _packed(values.T + 8, 1, order),
        "qzeros": _packed(torch.full_like(scale.T, 8), 1, order),
        "scales": scale.T.half().contiguous(),
    }


_QUANTISED = {"int8-w8a8": _int8_by_channel, "int4-w4a16": _int4_packed, "gptq": _gptq, "awq": _awq}


def _compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    whole = {"type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**whole, "dynamic": False, **weights},
        "input_activations": activations and {**whole, **activations},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_QUANTISATION: dict[str, dict[str, Any]] = {
    "int8-w8a8": _compressed(
        "int-quantized",
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "int4-w4a16": _compressed(
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": _GROUP}, None
    ),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"},
}


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _copy(model: Path, folder: Path, weights: dict[str, Any], config: dict[str, Any]) -> Path:
    """The model's folder with other weights, and `config` over its configuration."""
    from safetensors.torch import save_file

    shutil.copytree(model, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def _save(tokenizer: Any, folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool>", " and so on"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder
