"""What `model.engine` may hold: the names of vLLM's EngineArgs, known without importing vLLM.

Importing vLLM costs 7 s of CPU and needs its platform; reading its source file costs 0.1 s and works on a laptop that
only submits. Where vLLM is not installed nothing is known and nothing is refused: the engine itself will.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError

#: Arguments that Dray sets itself → what to do instead.
DRAY_SETS: dict[str, str] = {
    "model": "give the model as `model.source`",
    "model_weights": "give the model as `model.source`",
    "revision": "give it as `model.revision`",
    "tokenizer": "give it as `model.tokenizer`",
    "reasoning_parser": "give it as `sampling.reasoning_parser`, of each generation that reasons",
    "skip_tokenizer_init": "leave it out: the engine takes the end-of-sequence token from its tokenizer",
    "data_parallel_size": "Dray runs one engine per replica; give `pool.replicas` instead",
    "disable_log_stats": "leave it out: Dray reads the engine's request statistics",
    "enable_log_requests": "leave it out: Dray counts requests itself",
    "aggregate_engine_logging": "leave it out: Dray counts requests itself",
}
_DATA_PARALLEL = "data_parallel_"

#: Arguments that do not change what a row's answer is, beyond floating-point rounding: where and how fast it runs, how
#: requests are batched, what is logged. All others count as changing results and enter the fingerprint (design §4.2).
RESULT_NEUTRAL_ARGS: frozenset[str] = frozenset(
    {
        # how requests are batched and scheduled
        "async_scheduling",
        "block_size",
        "cudagraph_capture_sizes",
        "enable_chunked_prefill",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "max_cudagraph_capture_size",
        "max_long_partial_prefills",
        "max_num_active_seqs",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_num_scheduled_tokens",
        "max_num_seqs",
        "num_gpu_blocks_override",
        "prefill_schedule_interval",
        "scheduler_reserve_full_isl",
        "scheduling_policy",
        "stream_interval",
        "watermark",
        # caches and memory
        "cpu_offload_gb",
        "cpu_offload_params",
        "disable_hybrid_kv_cache_manager",
        "enable_cumem_allocator",
        "enable_prefix_caching",
        "enable_shm_tensor_arena",
        "enable_sleep_mode",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "kv_events_config",
        "kv_offloading_backend",
        "kv_offloading_size",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_params",
        "offload_prefetch_step",
        "prefix_cache_retention_interval",
        "prefix_caching_hash_algo",
        "skip_mm_profiling",
        # what is counted and logged
        "aggregate_engine_logging",
        "collect_detailed_traces",
        "cudagraph_metrics",
        "custom_histogram_buckets",
        "disable_log_stats",
        "enable_layerwise_nvtx_tracing",
        "enable_log_requests",
        "enable_logging_iteration_details",
        "enable_mfu_metrics",
        "enable_mm_processor_stats",
        "jit_monitor_mode",
        "jit_monitor_verbose",
        "log_config_file",
        "log_level",
        "logging_config",
        "max_logprobs",
        "otlp_traces_endpoint",
        "per_request_spec_decode_metrics",
        "profiler_config",
        "served_model_name",
        "show_hidden_metrics_for_version",
        # loading
        "download_dir",
        "hf_token",
        "max_parallel_loading_workers",
        "pt_load_map_location",
        "safetensors_load_strategy",
        "safetensors_prefetch_num_threads",
        "use_tqdm_on_load",
        # devices, parallelism and kernels
        "all2all_backend",
        "attention_backend",
        "compilation_config",
        "cp_kv_cache_interleave_size",
        "cpu_distributed_timeout_seconds",
        "dbo_decode_token_threshold",
        "dbo_prefill_token_threshold",
        "dcp_comm_backend",
        "dcp_kv_cache_interleave_size",
        "dcp_q_replicate",
        "decode_context_parallel_size",
        "device_ids",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_nccl_for_dp_synchronization",
        "distributed_executor_backend",
        "distributed_timeout_seconds",
        "dp_sync_interval",
        "enable_batch_sharded_sampling",
        "enable_dbo",
        "enable_elastic_ep",
        "enable_ep_weight_filter",
        "enable_eplb",
        "enable_expert_parallel",
        "enable_fault_tolerance",
        "enable_flashinfer_autotune",
        "enable_nccl_comm_suspend",
        "enforce_eager",
        "eplb_config",
        "expert_placement_strategy",
        "fail_on_environ_validation",
        "fault_tolerance_config",
        "kernel_config",
        "linear_backend",
        "master_addr",
        "master_port",
        "moe_backend",
        "nnodes",
        "node_rank",
        "numa_bind",
        "numa_bind_cpus",
        "numa_bind_nodes",
        "optimization_level",
        "performance_mode",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "ray_workers_use_nsight",
        "renderer_num_workers",
        "shutdown_timeout",
        "tensor_parallel_size",
        "ubatch_size",
    }
)


@lru_cache(maxsize=1)
def known_engine_args() -> frozenset[str] | None:
    """The fields of the installed vLLM's EngineArgs and AsyncEngineArgs; None where vLLM is not installed.

    Read from the source with `ast`: 0.1 s, no import.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    if not source.is_file():
        return None
    fields = {
        statement.target.id
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    return frozenset(name for name in fields if not name.startswith("_")) or None


def check_engine_args(engine: Mapping[str, Any]) -> None:
    """Raise ModelError for the first key of `model.engine` that vLLM does not know or that Dray sets itself."""
    known = known_engine_args()
    for key in engine:
        instead = DRAY_SETS.get(key)
        if instead is None and key.startswith(_DATA_PARALLEL):
            instead = DRAY_SETS["data_parallel_size"]
        if instead is not None:
            raise ModelError(f"model.engine.{key}: {instead}")
        if known is not None and key not in known:
            near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else "; the names are those of vLLM's EngineArgs"
            raise ModelError(f"model.engine.{key}: vLLM has no engine argument of this name{hint}")
