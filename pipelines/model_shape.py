"""How large a model is: parameters, bytes of weights, KV cache per token. From config.json and safetensors headers; no
weights are loaded and nothing is downloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError
from pipelines.model_cache import cached_model
from pipelines.model_weights import loads_weights
from pipelines.settings import ModelSettings
from pipelines.storage import Storage

#: Bytes of a parameter by safetensors' dtype names; the F8 family has one byte.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What sizing an engine needs to know of a model; None where its files do not tell."""

    parameters: int | None
    """Of an MoE model: all experts."""
    weight_bytes: int | None
    """Once vLLM has loaded them, over all GPUs of the engine."""
    kv_layers: int | None
    """Layers whose KV cache grows with the sequence."""
    kv_heads: int | None
    """KV heads of one layer; 1 for MLA, which has one latent vector per token and cannot be split between GPUs."""
    kv_head_bytes: int | None
    """KV bytes of one token, head and layer: keys and values, or MLA's latent vector."""
    vocabulary: int
    hidden: int
    intermediate: int
    max_model_len: int | None
    """Positions that the model was made for."""
    dtype: str
    """Of the activations, as vLLM chooses it."""

    def kv_bytes_per_token(self, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> int | None:
        """KV cache of one token on one GPU. A head that cannot be split is held by several GPUs."""
        if self.kv_layers is None or self.kv_heads is None or self.kv_head_bytes is None:
            return None
        layers = math.ceil(self.kv_layers / pipeline_parallel)
        return layers * max(1, math.ceil(self.kv_heads / tensor_parallel)) * self.kv_head_bytes


def read_shape(model: ModelSettings) -> ModelShape | None:
    """The shape of a model that is on this machine: a local folder, or in a cache. None where it is not, or has no
    config.json that tells. Of a URL that is not in the cache yet only config.json is read.

    Raises ModelError for weight files that are cut short.
    """
    path = Path(model.source).expanduser()
    folder = path if path.is_dir() else _cached_folder(model)
    if folder is None:
        return _stored_shape(model) if "://" in model.source else None
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    counts = None
    if loads_weights(model.engine):
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        files = [folder / name for name in weight_files(sizes, weight_index(folder))]
        counts = count_parameters(files) if all(file.exists() for file in files) else None
    return shape_of(config, model.engine, counts)


def _cached_folder(model: ModelSettings) -> Path | None:
    found = cached_model(model.source, model.revision, model.storage_options) if model.revision else None
    if found is None and "://" in model.source:
        return None
    return found[0] if found else cached(model.source, model)


def _stored_shape(model: ModelSettings) -> ModelShape | None:
    try:
        config = json.loads(Storage(model.source, model.storage_options).read("config.json"))
    except (FileNotFoundError, ValueError):
        return None
    return shape_of(config, model.engine) if isinstance(config, dict) else None


def shape_of(
    config: Mapping[str, Any], engine: Mapping[str, Any], counts: Mapping[str, int] | None = None
) -> ModelShape:
    """The shape that a `config.json` describes under vLLM's engine arguments.

    `counts`: parameters by dtype from the weight files; without them parameters are reckoned from the config, exact but
    for norms and biases where the layers are those of Llama, Qwen, Mistral or Mixtral.
    """
    text: Mapping[str, Any] = {
        **config,
        **(config.get("text_config") or {}),
        **(engine.get("hf_overrides") or {}),
    }
    dtype = _dtype(text, engine)
    if counts is not None:
        parameters: int | None = sum(counts.values())
        weight_bytes: int | None = weights_in_memory(counts, engine)
    else:
        parameters = _reckoned_parameters(text)
        weight_bytes = None if parameters is None else int(parameters * _weight_width(text, engine, dtype))
    wide = 1 if str(engine.get("kv_cache_dtype", "auto")).startswith("fp8") else _DTYPE_BYTES[dtype]
    heads, head_bytes = _kv_heads(text, wide)
    return ModelShape(
        parameters=parameters,
        weight_bytes=weight_bytes,
        kv_layers=_kv_layers(text),
        kv_heads=heads,
        kv_head_bytes=head_bytes,
        vocabulary=_number(text, "vocab_size") or 0,
        hidden=_number(text, "hidden_size", "n_embd") or 0,
        intermediate=_number(text, "intermediate_size", "ffn_dim", "n_inner") or 0,
        max_model_len=_number(text, "max_position_embeddings", "n_positions"),
        dtype=dtype,
    )


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _dtype(config: Mapping[str, Any], engine: Mapping[str, Any]) -> str:
    """vLLM's `dtype: auto` takes the checkpoint's, and 16 bits for 32-bit ones (vllm/config/model.py)."""
    asked = str(engine.get("dtype", "auto")).removeprefix("torch.")
    if asked in _DTYPE_BYTES:
        return {"float": "float32", "half": "float16"}.get(asked, asked)
    own = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return own if own in ("bfloat16", "float16") else "bfloat16"


def _kv_layers(config: Mapping[str, Any]) -> int | None:
    """Without layers of bounded memory: sliding windows, linear attention and state-space layers."""
    layers = _number(config, "num_hidden_layers", "n_layer")
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if layers is None or not isinstance(kinds, list) or len(kinds) != layers:
        return layers
    return sum(kind in ("full_attention", "attention") for kind in kinds) or layers


def _kv_heads(config: Mapping[str, Any], wide: int) -> tuple[int | None, int | None]:
    """KV heads of a layer and the bytes of one of them."""
    latent = _number(config, "kv_lora_rank")
    if latent is not None:  # MLA: one compressed vector and the rotary part of the key, for all heads
        return 1, (latent + (_number(config, "qk_rope_head_dim") or 0)) * wide
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd")
    size = _number(config, "head_dim") or (hidden // heads if hidden and heads else None)
    kv_heads = _number(config, "num_key_value_heads") or (1 if config.get("multi_query") else heads)
    return kv_heads, None if size is None else 2 * size * wide


def _reckoned_parameters(config: Mapping[str, Any]) -> int | None:
    """Embeddings, attention and gated MLP; None for layers that are built otherwise (MLA, hybrids)."""
    layers, hidden = _number(config, "num_hidden_layers"), _number(config, "hidden_size")
    heads, vocabulary = _number(config, "num_attention_heads"), _number(config, "vocab_size")
    inner = _number(config, "moe_intermediate_size", "intermediate_size")
    if not (layers and hidden and heads and vocabulary and inner) or _number(config, "kv_lora_rank"):
        return None
    size = _number(config, "head_dim") or hidden // heads
    kv_heads = _number(config, "num_key_value_heads") or heads
    experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    attention = 2 * hidden * size * (heads + kv_heads)
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + experts * 3 * hidden * inner)


def _weight_width(config: Mapping[str, Any], engine: Mapping[str, Any], dtype: str) -> float:
    """Bytes of one parameter by the config's quantisation, or the one that vLLM is asked for."""
    own = config.get("quantization_config") or {}
    bits = own.get("bits") or own.get("w_bit")
    if isinstance(bits, int):
        return bits / 8
    method = str(engine.get("quantization") or own.get("quant_method") or "")
    return (1.0 if "fp8" in method else 0.5) if method else _DTYPE_BYTES[dtype]


# ── Weight files ────────────────────────────────────────────────────────────────────────────────────────────────


def cached(source: str, model: ModelSettings) -> Path | None:
    """The hub cache's snapshot of a model (or tokenizer), as far as its config.json is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in ("config.json", "tokenizer_config.json"):
            found = try_to_load_from_cache(
                source, name, cache_dir=model.engine.get("download_dir"), revision=model.revision
            )
            if isinstance(found, str):
                return Path(found).parent
    except HFValidationError:
        pass  # no hub id; whoever loads the model says so
    return None


def weight_index(folder: Path) -> Any:
    """The parsed `model.safetensors.index.json`, or None."""
    path = folder / "model.safetensors.index.json"
    return json.loads(path.read_text()) if path.exists() else None


def weight_names(folder: Path) -> set[str]:
    """The names of a checkpoint's tensors; none for one without safetensors. Raises ModelError as `count_parameters`."""
    if index := weight_index(folder):
        return {*index["weight_map"]}
    return {name for path in folder.glob("*.safetensors") for name in _header(path)}


def weight_files(sizes: Mapping[str, int], index: Mapping[str, Any] | None) -> list[str]:
    """The safetensors files that count: some repositories hold the same weights twice."""
    if index:
        return sorted(set(index["weight_map"].values()))
    if "model.safetensors" in sizes:
        return ["model.safetensors"]
    return sorted(name for name in sizes if name.endswith(".safetensors"))


def count_parameters(files: Sequence[Path]) -> dict[str, int] | None:
    """dtype → number of parameters, from safetensors headers; None without such files.

    Format: 8 bytes of length (little endian), then JSON: https://huggingface.co/docs/safetensors. Raises ModelError
    for a file that is cut short or is no safetensors file.
    """
    counts: dict[str, int] = {}
    for path in files:
        for tensor in _header(path).values():
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    return counts or None


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":  # of a Git LFS pointer
            raise ModelError(
                f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` there"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ModelError(f"{path} is no whole safetensors file ({size:,} bytes)")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size < end:
        raise ModelError(f"{path} is cut short: {size:,} of {end:,} bytes")
    return header


def weights_in_memory(parameters: Mapping[str, int], engine: Mapping[str, Any]) -> int:
    """Bytes of the weights once vLLM has loaded them, over all GPUs.

    vLLM casts 32-bit checkpoints to 16 bits unless `dtype` says float32 (vllm/config/model.py). `quantization: fp8`
    halves 16-bit weights while loading; any other method named for an unquantised checkpoint counts as four bits.
    """
    wide = 4 if str(engine.get("dtype")) in ("float32", "float") else 2
    quantization, quantised = (
        engine.get("quantization"),
        any(name.startswith(("F8", "I", "U")) for name in parameters),
    )
    if quantization and not quantised:
        wide_bytes = 1.0 if "fp8" in str(quantization) else 0.5
        return int(sum(parameters.values()) * wide_bytes)
    total = 0
    for name, count in parameters.items():
        floating = name in ("F64", "F32", "F16", "BF16")
        total += count * (wide if floating else _BYTES.get(name, 1))
    return total
