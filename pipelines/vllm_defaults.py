"""What Dray gives vLLM where the user says nothing: engine arguments and environment variables, by device.

Whatever stands in `model.engine` or in the environment already wins.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import psutil

from pipelines.model_shape import read_shape
from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings
from pipelines.sizing import GIB, size_for_cpu, size_for_gpu

#: No usage statistics, errors only: a start on a CPU logs 14 warnings that ask for nothing.
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def set_quiet_environment() -> None:
    """Has to be called before vLLM is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def gpu_defaults(
    model: ModelSettings,
    sampling: SamplingSettings,
    pool: PoolSettings,
    gpu_bytes: int,
    others: Sequence[SamplingSettings] = (),
) -> dict[str, Any]:
    """EngineArgs for an engine on GPUs of `gpu_bytes` of memory each; sets environment variables.

    `others`: further generations' sampling, for which the engine must be fit too.
    """
    if importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    packed = 1 if pool.engines_per_gpu == "auto" else pool.engines_per_gpu
    sizing = size_for_gpu(read_shape(model), model, sampling, gpu_bytes, packed)
    return {**_common(model, (sampling, *others)), **sizing.args}


def cpu_defaults(
    model: ModelSettings,
    sampling: SamplingSettings,
    pool: PoolSettings,
    others: Sequence[SamplingSettings] = (),
) -> dict[str, Any]:
    """EngineArgs for an engine that shares its host with other engines; sets environment variables. `others` as above.

    vLLM's own defaults are for one engine per host: it binds threads to the first cores of a NUMA node (two engines
    would share them, and tensor parallelism wants a node per rank) and takes most of the memory for its KV cache.
    """
    ranks = model.tensor_parallel_size
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(max(1, _cores(pool) // ranks))
    # AsyncLLM's EngineCore is a process of its own in any case; "1" adds a worker process behind shared-memory queues
    # that spin. 1,000 requests of 32 + 32 tokens, tiny Llama, 2 busy cores: 3.8–6.8 s of CPU with "0", 11.7–13.7 with
    # "1" (10.6 k and 2.3 k tokens/s at best); start-up 15 and 23 s of CPU.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    defaults = _common(model, (sampling, *others))
    if any(one.may_be_seeded or one.is_structured for one in (sampling, *others)):  # another try has a seed
        # vLLM 0.32 turns a seeded request's generator back after each chunk of a prefill, which a CPU generator
        # cannot do: the engine dies ("CPU Generator does not use offset").
        defaults["enable_chunked_prefill"] = False
    sizing = size_for_cpu(read_shape(model), model, sampling, cpu_kv_bytes(model))
    defaults |= sizing.args
    return defaults


def cpu_kv_bytes(model: ModelSettings) -> int | None:
    """Bytes for a CPU engine's KV cache; None where the user said how many. vLLM fills it with zeros at the start, so all
    of it is resident from then on.
    """
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # set but blank, vLLM fails on it
    if {"kv_cache_memory_bytes", "gpu_memory_utilization"} & model.engine.keys():
        return None
    return min(4 * GIB, psutil.virtual_memory().available // (8 * model.tensor_parallel_size))


def _common(model: ModelSettings, samplings: Sequence[SamplingSettings]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "model": model.source,
        "revision": model.revision,
        "tokenizer": model.tokenizer,
        # Switches vLLM's stat loggers off; with a logger of our own in their place requests still carry metrics.
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "max_logprobs": max(20, *(sampling.logprobs or 0 for sampling in samplings)),
    }
    if model.tensor_parallel_size * int(model.engine.get("pipeline_parallel_size", 1)) > 1:
        # Inside a Ray actor vLLM might choose its `ray` backend, which wants a placement group and fails on CPU.
        defaults["distributed_executor_backend"] = "mp"
    return defaults


def _cores(pool: PoolSettings) -> int:
    """Cores of one engine: what the job says, else OMP_NUM_THREADS (Ray sets it to an actor's CPUs), else all."""
    if isinstance(pool.cpus_per_engine, (int, float)):
        return int(pool.cpus_per_engine)
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
