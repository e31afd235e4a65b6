"""How large an engine is made: requests at once, tokens a step, captured CUDA graphs, and its share of a GPU.

    ModelShape + memory of one GPU ─► Sizing: vLLM's arguments, and how many engines one GPU holds

All of it is arithmetic, so that `dray plan` shows what an engine will get. Whatever stands in `model.engine` wins.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.model_shape import ModelShape
from pipelines.settings import ModelSettings, SamplingSettings

GIB = 1024**3
#: An engine's share of its GPU where it is alone: vLLM's own default until 0.31.
UTILISATION = 0.9
#: What a process holds of a GPU outside of `gpu_memory_utilization`: its CUDA context, and captured graphs before vLLM
#: 0.27 or so, which count towards nothing.
OUTSIDE_BYTES = int(1.5 * GIB)
#: GPUs from here on (A100 80 GB, H100, H200 …) are fed 512 requests of 16,384 tokens a step, smaller ones half of it.
LARGE_GPU = 70 * GIB
#: Tokens of the largest CUDA graph. vLLM stops at 512 by itself; a step of more tokens, so each that takes in a prompt
#: beside a full batch, then launches its kernels one by one. Measured on an H200 with 0.5B, 512 in flight, a request in
#: as one leaves: such a step 38.5 ms with graphs up to 512, 17.9 ms up to 2,048; 17.8 k and 29.1 k output tokens/s
#: (docs/performance.md). The graphs beyond 512 cost a second of start-up and 0.13 GiB.
CAPTURED = 2048
#: Packing pays where the host is the bottleneck. Measured on an H200 with 0.5B: two engines 2.0x of one (both trickle-in),
#: three 58.3 k against 51.2 k tokens/s of one (both in waves); 7B fills the GPU alone. More than three: not measured.
PACKED_PARAMETERS = 2_000_000_000
MOST_PACKED = 3
#: CPU cores of one engine of a small model: EngineCore and Dray's actor each keep one busy.
CORES = 2
#: Tokens that a request is taken to hold when nothing else is known: this prompt and half of `max_tokens`.
PROMPT_TOKENS = 512
#: A step is made smaller than it would be, down to so many tokens, where its activations took more than the KV cache.
LEAST_BATCHED = 2048
#: Requests at once that an engine packed with others must have room for, or they cost more than they give.
LEAST_PACKED_SEQS = 128


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """One engine's numbers. Bytes are of one GPU; None where something that they need is not known."""

    args: dict[str, Any]
    """vLLM's engine arguments, the user's own included where they name the same thing."""
    given: tuple[str, ...] = ()
    """Which of `args` are the user's own."""
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    kv_bytes: int | None = None
    """Left for the KV cache after weights and activations."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds, of all requests together."""
    notes: tuple[str, ...] = field(default=())
    """What is not known, or does not fit."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def size_for_gpu(
    shape: ModelShape | None,
    model: ModelSettings,
    sampling: SamplingSettings,
    gpu_bytes: int,
    engines_per_gpu: int = 1,
) -> Sizing:
    """An engine on GPUs of `gpu_bytes` each, which it shares with `engines_per_gpu` - 1 others."""
    given = model.engine
    large = gpu_bytes >= LARGE_GPU
    seqs = _most_seqs(given, 512 if large else 256)
    batched = max(int(given.get("max_num_batched_tokens") or (16_384 if large else 8_192)), seqs)
    share = float(given.get("gpu_memory_utilization") or gpu_share(gpu_bytes, engines_per_gpu))
    weights = activations = per_token = None
    if shape is not None:
        tensor, pipeline = model.tensor_parallel_size, model.gpus_per_engine // model.tensor_parallel_size
        per_token = shape.kv_bytes_per_token(tensor, pipeline)
        weights = None if shape.weight_bytes is None else shape.weight_bytes // (tensor * pipeline)
        free = share * gpu_bytes - (weights or 0)
        if "max_num_batched_tokens" not in given:
            while batched > LEAST_BATCHED and activation_bytes(shape, seqs, batched, tensor) > free / 2:
                batched = max(batched // 2, LEAST_BATCHED)
        activations = activation_bytes(shape, seqs, batched, tensor)
    kv_bytes = kv_tokens = None
    if given.get("kv_cache_memory_bytes"):
        kv_bytes = int(given["kv_cache_memory_bytes"])
    elif weights is not None and activations is not None:
        kv_bytes = int(share * gpu_bytes) - weights - activations
    notes = _unknown(shape)
    if kv_bytes is not None and per_token:
        kv_tokens = max(0, kv_bytes) // per_token
        if kv_bytes <= 0:
            notes = (
                *notes,
                f"does not fit: {_gib(weights or 0)} of weights in {_gib(int(share * gpu_bytes))}",
            )
        if "max_num_seqs" not in given:
            seqs = fitting_seqs(kv_tokens, working_tokens(shape, model, sampling), most=seqs, n=sampling.n)
    args: dict[str, Any] = {"max_num_seqs": seqs, "gpu_memory_utilization": share}
    if given.get("enable_chunked_prefill") is not False or "max_num_batched_tokens" in given:
        args["max_num_batched_tokens"] = batched  # else vLLM raises its own number to max_model_len
    if engines_per_gpu > 1 and (kv_bytes or 0) > 0:
        args["kv_cache_memory_bytes"] = kv_bytes  # vLLM measures no memory then: engines start side by side
    args |= _captured(given, seqs, batched)
    return Sizing(
        args=args,
        given=tuple(name for name in args if name in given),
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        notes=notes,
    )


def size_for_cpu(
    shape: ModelShape | None, model: ModelSettings, sampling: SamplingSettings, kv_bytes: int | None
) -> Sizing:
    """An engine on a CPU, with `kv_bytes` for its KV cache (None: by `VLLM_CPU_KVCACHE_SPACE` or `model.engine`).

    The numbers are those that `vllm.LLM` has for a CPU: 256 requests and 4,096 tokens a step, for each rank.
    """
    given, ranks = model.engine, model.gpus_per_engine
    seqs = _most_seqs(given, 256 * ranks)
    args: dict[str, Any] = {}
    if given.get("kv_cache_memory_bytes"):
        kv_bytes = int(given["kv_cache_memory_bytes"])
    elif kv_bytes is not None:
        args["kv_cache_memory_bytes"] = kv_bytes
    per_token = shape.kv_bytes_per_token(model.tensor_parallel_size) if shape else None
    kv_tokens = None
    if kv_bytes is not None and per_token:
        kv_tokens = kv_bytes // per_token
        if "max_num_seqs" not in given:
            seqs = fitting_seqs(kv_tokens, working_tokens(shape, model, sampling), most=seqs, n=sampling.n)
    args["max_num_seqs"] = seqs
    # A seeded CPU engine runs without chunked prefill (`vllm_defaults`); vLLM then raises its own number to max_model_len.
    chunked = given.get("enable_chunked_prefill", not sampling.may_be_seeded)
    if chunked or "max_num_batched_tokens" in given:
        args["max_num_batched_tokens"] = max(int(given.get("max_num_batched_tokens") or 4096 * ranks), seqs)
    return Sizing(
        args={**args, **{name: given[name] for name in args if name in given}},
        given=tuple(name for name in args if name in given),
        weight_bytes=shape.weight_bytes if shape else None,
        kv_bytes_per_token=per_token,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        notes=_unknown(shape),
    )


def engines_that_fit(
    shape: ModelShape | None,
    model: ModelSettings,
    sampling: SamplingSettings,
    gpu_bytes: int,
    cores_per_gpu: float = math.inf,
) -> int:
    """How many engines of this model one GPU may be given.

    More than one only where all of this holds: the model has fewer than 2 billion parameters, which leaves a large GPU
    to its host; one engine takes one GPU; each engine's share holds weights, activations and the KV cache of 128
    requests; and there are two cores for each. At most three.
    """
    if (
        model.gpus_per_engine > 1
        or shape is None
        or (shape.parameters or PACKED_PARAMETERS) >= PACKED_PARAMETERS
    ):
        return 1
    if (
        "gpu_memory_utilization" in model.engine
    ):  # the user's own share is respected: as many as it leaves room for
        share = float(model.engine["gpu_memory_utilization"])
        most = min(MOST_PACKED, int(gpu_bytes // (share * gpu_bytes + OUTSIDE_BYTES)))
    else:
        most = MOST_PACKED
    for engines in range(most, 1, -1):
        sizing = size_for_gpu(shape, model, sampling, gpu_bytes, engines)
        need = LEAST_PACKED_SEQS * working_tokens(shape, model, sampling)
        if (sizing.kv_tokens or 0) >= need and CORES * engines <= cores_per_gpu:
            return engines
    return 1


def gpu_share(gpu_bytes: int, engines_per_gpu: int) -> float:
    """`gpu_memory_utilization` of each of several engines on one GPU: what is left of it after their CUDA contexts."""
    inside = 1 - engines_per_gpu * OUTSIDE_BYTES / gpu_bytes if gpu_bytes else 1.0
    return math.floor(1000 * max(0.01, min(UTILISATION, inside) / engines_per_gpu)) / 1000


def activation_bytes(shape: ModelShape, seqs: int, batched: int, tensor_parallel: int = 1) -> int:
    """Memory of the largest step on one GPU: the MLP's and the residual activations of its tokens, and logits in 32 bits,
    three times, of its requests. At least 1 GiB; vLLM's own profile finds 1 to 3 GiB for models of 0.5B to 7B.
    """
    step = batched * (2 * shape.intermediate // tensor_parallel + 4 * shape.hidden) * 2
    return max(GIB, step + 3 * 4 * seqs * shape.vocabulary)


def working_tokens(shape: ModelShape | None, model: ModelSettings, sampling: SamplingSettings) -> int:
    """Tokens of KV cache that one sample is taken to hold: a prompt of 512 and half of its longest answer."""
    longest = int(model.engine.get("max_model_len") or (shape and shape.max_model_len) or 4096)
    return max(1, min(longest, PROMPT_TOKENS + (sampling.max_tokens or 1024) // 2))


def fitting_seqs(kv_tokens: int, tokens_each: int, *, most: int, n: int = 1) -> int:
    """Requests at once whose KV cache fits, in steps of 8 (those of captured graphs). 8 at least, and one request's
    samples: what has no room waits inside the engine.
    """
    return max(n, min(most, max(8, kv_tokens // tokens_each // 8 * 8)))


def _most_seqs(given: dict[str, Any], default: int) -> int:
    return int(given.get("max_num_seqs") or default)


def _captured(given: dict[str, Any], seqs: int, batched: int) -> dict[str, Any]:
    """Graphs for every batch up to `seqs` requests, and for steps that take in prompts beside them.

    Nothing where the user chose, and for speculative decoding, whose steps hold several tokens of a request: vLLM
    reckons those itself.
    """
    compilation = given.get("compilation_config")
    inside = compilation.keys() if isinstance(compilation, dict) else set()
    chosen = {"max_cudagraph_capture_size", "cudagraph_capture_sizes"}
    if given.get("enforce_eager") or given.get("speculative_config") or chosen & {*given, *inside}:
        return {name: given[name] for name in sorted(chosen) if name in given}
    return {"cudagraph_capture_sizes": capture_sizes(seqs, min(batched, max(seqs, min(4 * seqs, CAPTURED))))}


def capture_sizes(seqs: int, most: int) -> list[int]:
    """Tokens of each graph up to `most`: in vLLM's steps (8, from 256 on 16) for `seqs` requests, an eighth apart above.

    A step is padded to the next larger graph; a decode step, the usual one, by 15 tokens at most.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, seqs + 16, 16)]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(16, 2 ** (sizes[-1].bit_length() - 1) // 8))
    return sorted({min(size, most) for size in sizes})


def _unknown(shape: ModelShape | None) -> tuple[str, ...]:
    if shape is None:
        return ("the model is not on this machine, so its size is not known",)
    notes = []
    if shape.weight_bytes is None:
        notes.append("the size of the weights is not known")
    if shape.kv_bytes_per_token() is None:
        notes.append("the KV cache's size per token is not known")
    return tuple(notes)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
