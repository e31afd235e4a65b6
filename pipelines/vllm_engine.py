"""The real engine: vLLM's AsyncLLM behind `pipelines.engine.Engine`. Only this file, `vllm_requests`, `vllm_images`
and `vllm_parsers` import vLLM (0.26 to 0.32).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from pipelines import vllm_log
from pipelines.answer_parsers import open_parser
from pipelines.engine import Answer, CacheUse, EngineInfo, StartParts, TokenIds, check_prompt
from pipelines.engine_args import check_engine_args, known_engine_args
from pipelines.errors import (
    BadInput,
    EngineDied,
    EngineStartError,
    RowError,
    TransientStorageError,
)
from pipelines.images import Image
from pipelines.model_folder import local_model, lora_rank
from pipelines.model_weights import load_format
from pipelines.row_settings import MOST_SETTINGS
from pipelines.scopes import scope_of
from pipelines.settings import LoraSettings, ModelSettings, PoolSettings, SamplingSettings
from pipelines.task import GENERATE, Task
from pipelines.vllm_defaults import cpu_defaults, gpu_defaults, set_quiet_environment
from pipelines.vllm_images import ImageRenderer, added_tokens
from pipelines.vllm_requests import (
    check_requests,
    constraining_parser,
    generated,
    one_line,
    pooled,
    pooling_params,
    reasoning_options,
    row_params,
    sampling_params,
    scored,
    scoring_params,
    structured_args,
)
from pipelines.vllm_start import compile_key, start_turn

#: Seconds for killed processes to go: a GPU's memory is given back in that time.
KILL_S = 20.0
#: `max_num_batched_tokens` of an engine that scores, unless the job says one: vLLM makes the logits of all of a prompt's
#: tokens in a step at once, in 32 bits and beside what it has profiled; 2.5 GB for 2,048 of them and 152,000 logits, twice.
SCORED_TOKENS = 2048
#: What vLLM takes for `max_lora_rank` (vllm/config/lora.py).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine:
    """One AsyncLLM with its EngineCore process, built in `start`.

    Requests are token ids and answers are token ids (`detokenize=False`, `FINAL_ONLY`: 9.5 µs of this process's time
    per output token instead of 24), unless stop strings or a slow tokenizer need the engine's own text. Numbers that
    the user leaves out are those of `vllm.LLM`, not AsyncLLM's serving defaults.
    """

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        pool: PoolSettings,
        others: Sequence[SamplingSettings] = (),
        task: Task = GENERATE,
    ) -> None:
        self._model = model
        self._task = task
        self._sampling, self._others = sampling, others
        self._pool = pool
        self._building: asyncio.Future[Any] | None = None
        self._llm: Any = None
        self._params: Any = None
        self._other_params: OrderedDict[int, tuple[SamplingSettings, Any]] = OrderedDict()
        """By the object's id, with the object, lest another one gets it; the least recently used first."""
        self._images = ImageRenderer()
        self._lora: Any = None
        self._lora_load: asyncio.Future[Any] | None = None
        self._max_model_len = 0
        self._keeps_special: dict[tuple[Any, ...], bool] = {}
        """By parsers: whether they read special tokens."""
        self._knows_reasoning = False
        """Whether vLLM has the answers' parser of reasoning, behind which alone constraints hold."""
        self._in_flight: set[str] = set()
        self._labels: dict[int, str] = {}
        self._family: list[psutil.Process] = []
        self._last_token_at = 0.0
        self._output_tokens = 0
        self._cache_use = CacheUse()
        self._log: Path | None = None
        self._log_offset = 0
        self._start_parts = StartParts()

    async def start(self) -> EngineInfo:
        """Load the model: 10 s for a tiny one on a CPU, minutes for a large one. Raises EngineStartError, BadInput for a
        model that cannot be brought here or is refused, and TransientStorageError for one that may come at the next try.

        AsyncLLM's constructor blocks until the model is loaded, so it runs on a thread; it needs no event loop there
        and starts its output task with the first request, in the loop that made it. After a cancelled start call
        `stop`, which waits for the thread.
        """
        began = time.monotonic()
        self._building = asyncio.ensure_future(asyncio.to_thread(self._build))
        try:
            await asyncio.shield(self._building)
        except (EngineStartError, BadInput, TransientStorageError):
            raise
        except Exception as error:  # whatever vLLM, torch and transformers raise: the model does not load
            raise EngineStartError(self._start_reason(error)) from error
        config = self._llm.vllm_config
        self._max_model_len = int(config.model_config.max_model_len)
        self._labels = getattr(config.model_config.hf_config, "id2label", None) or {}
        return EngineInfo(
            name=f"vllm {_vllm_version()}",
            device=_device_name(),
            max_model_len=self._max_model_len,
            max_num_seqs=max(1, int(config.scheduler_config.max_num_seqs) // self._sampling.n),
            # A pooled prompt holds its tokens for the steps that read it, and vLLM lets in as many as fit.
            kv_tokens=None if self._task.pools else _kv_tokens(config.cache_config),
            start_s=time.monotonic() - began,
            ready_at=time.time(),
            start_parts=self._start_parts,
        )

    async def generate(
        self,
        request_id: str,
        token_ids: TokenIds,
        seed: int | None,
        max_tokens: int | None = None,
        sampling: SamplingSettings | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        images: Sequence[Image] = (),
    ) -> Answer:
        """See `Engine.generate`. `seed` fits into 63 bits; vLLM adds the sample index to it."""

        params = self._params if sampling is None else self._params_of(sampling)
        if seed is not None or max_tokens is not None:
            params = copy(params)
            params.seed = seed
            params.max_tokens = max_tokens or params.max_tokens
        began = time.monotonic()
        reasons = (sampling or self._sampling).reasoning_parser is not None
        options = reasoning_options(reasons, variables) if self._knows_reasoning else {}
        output = await self._ask(request_id, token_ids, params, options, images)
        return generated(output, params, began, added_tokens(output, token_ids, images))

    async def encode(
        self, request_id: str, token_ids: TokenIds, task: Task, *, images: Sequence[Image] = ()
    ) -> Answer:
        """See `Engine.encode`."""
        output = await self._ask(request_id, token_ids, pooling_params(task), images=images)
        self._note_tokens(len(output.prompt_token_ids))
        labels = self._labels if task.name == "classify" else None
        return pooled(output, labels, added_tokens(output, token_ids, images))

    async def score(self, request_id: str, token_ids: TokenIds, *, images: Sequence[Image] = ()) -> Answer:
        """See `Engine.score`."""
        output = await self._ask(request_id, token_ids, scoring_params(), images=images)
        return scored(output, added_tokens(output, token_ids, images))

    async def _ask(
        self,
        request_id: str,
        token_ids: TokenIds,
        params: Any,
        options: Mapping[str, Any] = MappingProxyType({}),
        images: Sequence[Image] = (),
    ) -> Any:
        """vLLM's output for one request; `params`, of sampling or of pooling, say which kind it is. Raises as `generate`."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        llm = self._llm
        if llm is None:
            raise EngineDied("the engine is not running")
        answered = not self._task.pools
        ids = check_prompt(token_ids, self._max_model_len, answered=answered)
        # The rendered form of a prompt: vLLM 0.32 sends the raw form (TokensPrompt) through a thread pool first.
        prompt: Any = {"type": "token", "prompt_token_ids": ids}
        if images:
            try:
                prompt = await self._images.render(llm, ids, images)
            except RowError as error:
                if self._llm is None:  # `stop` ends what renders as well
                    raise EngineDied("the engine was stopped") from error
                raise
            check_prompt(prompt["prompt_token_ids"], self._max_model_len, answered=answered)
        if self._lora is not None:
            await self._load_lora(llm)
        if self._task.pools:
            await self._check_task(llm)
        ask = llm.encode if self._task.pools else llm.generate
        stream: AsyncIterator[Any] = ask(
            prompt,
            params,
            request_id,
            lora_request=self._lora,
            **options,
        )
        output: Any = None
        self._in_flight.add(request_id)
        try:
            async for output in stream:  # FINAL_ONLY: once  # noqa: B007
                pass
        except EngineDeadError as error:
            raise EngineDied(self._death_reason()) from error
        except Exception as error:
            if llm.errored:  # the output task died of it: not this request's fault
                raise EngineDied(self._death_reason()) from error
            if scope_of(error, of_request=True) != "row":
                raise
            refusal = error.__cause__ if isinstance(error, EngineGenerateError) else error
            raise RowError("invalid_request", one_line(refusal)) from error
        finally:
            self._in_flight.discard(request_id)
        if self._llm is None:  # `stop` aborts what is in flight, which then ends like any other request
            raise EngineDied("the engine was stopped")
        return output

    async def _load_lora(self, llm: Any) -> None:
        """Before the first request: an adapter that comes with a request, as vLLM has it, ends EngineCore if it does not
        fit, as if the prompt were to blame. Not in `start`, whose event loop the engine must not take.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._lora_load is None:
            self._lora_load = asyncio.ensure_future(llm.add_lora(self._lora))
        try:
            await asyncio.shield(self._lora_load)
        except EngineDeadError as error:
            raise EngineDied(self._death_reason()) from error
        except Exception as error:  # whatever vLLM, torch and safetensors raise: the adapter does not load
            assert self._model.lora is not None
            reason = vllm_log.reason_since(self._log, self._log_offset) or one_line(error)
            source = self._model.lora.source
            raise EngineStartError(f"adapter {source!r} does not load: {reason[:600]}") from error

    async def _check_task(self, llm: Any) -> None:
        """Whether the model does what it was opened for: vLLM knows once it has loaded it, and then refuses each request."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            tasks = await llm.get_supported_tasks()  # asked once, then remembered
        except EngineDeadError as error:
            raise EngineDied(self._death_reason()) from error
        if self._task.name not in tasks:
            raise EngineStartError(
                f"model {self._model.source!r} does not {self._task.name}: vLLM has it for {', '.join(tasks)} "
                "(model.engine.convert and pooler_config say what a model is made into)"
            )

    @property
    def last_token_at(self) -> float:
        return self._last_token_at

    @property
    def output_tokens(self) -> int:
        return self._output_tokens

    @property
    def cache_use(self) -> CacheUse:
        return self._cache_use

    async def stop(self) -> None:
        """End EngineCore and its workers, also after a cancelled start; requests still in flight get EngineDied."""
        building, self._building = self._building, None
        if building is not None:
            await asyncio.gather(building, return_exceptions=True)  # `start` raises what went wrong
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if self._in_flight and not llm.errored:
            await llm.abort(list(self._in_flight))
        if llm.output_handler is not None:  # before its sockets go, which it would log as an engine's death
            llm.output_handler.cancel()
            await asyncio.gather(llm.output_handler, return_exceptions=True)
        last_reference = [llm]
        del llm
        await asyncio.to_thread(_shut_down, last_reference)

    def kill(self) -> None:
        """SIGKILL for EngineCore and its workers: a tensor-parallel worker may outlive an EngineCore that was killed."""
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._family, timeout=KILL_S)

    def _params_of(self, sampling: SamplingSettings) -> Any:
        """vLLM's parameters for requests that are sampled otherwise than the engine's own, made once for each object while
        the latest are remembered. Raises RowError where a row's own will not do."""
        known = self._other_params
        if id(sampling) not in known:
            tokenizer = self._llm and self._llm.tokenizer
            if sampling.params_column is None:
                params = self._sampling_params(sampling)
            else:
                params = row_params(sampling, self._sampling, self._sampling_params, tokenizer)
            params.detokenize = params.detokenize or not _is_fast(tokenizer)
            known[id(sampling)] = (sampling, params)
            if len(known) > MOST_SETTINGS:
                known.popitem(last=False)
        known.move_to_end(id(sampling))
        return known[id(sampling)][1]

    def _sampling_params(self, sampling: SamplingSettings) -> Any:
        """vLLM's parameters. A text that vLLM makes is read by the parsers of `sampling`, if it has any. Raises ModelError."""
        params = sampling_params(sampling)
        parsers = (sampling.reasoning_parser, sampling.tool_call_parser, sampling.skip_special_tokens)
        if parsers not in self._keeps_special:
            parser = open_parser(self._model, sampling, None)
            self._keeps_special[parsers] = parser is not None and parser.keeps_special_tokens
        if self._keeps_special[parsers]:
            params.skip_special_tokens = False
        return params

    # ── Building ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _build(self) -> None:
        """Import vLLM and construct the engine; blocks."""
        check_engine_args(self._model.engine)
        model = local_model(self._model, weights=True)
        set_quiet_environment()
        self._log = vllm_log.error_log()
        self._log_offset = vllm_log.size(self._log)
        starts = vllm_log.starts(self._log)
        starts_offset = vllm_log.size(starts)
        began = time.monotonic()

        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        own_import_s = time.monotonic() - began
        on_cpu = bool(current_platform.is_cpu())
        if not current_platform.device_type:
            raise EngineStartError(
                "vLLM finds no device: no GPU is visible, and this vLLM is not its CPU build"
            )
        if self._pool.device not in ("auto", "cpu" if on_cpu else "gpu"):
            raise EngineStartError(
                f"pool.device is {self._pool.device}, but this vLLM runs on {current_platform.device_type}"
            )
        if on_cpu:
            defaults = cpu_defaults(model, self._sampling, self._pool, self._others)
        else:
            gpu_bytes = int(current_platform.get_device_total_memory())
            defaults = gpu_defaults(model, self._sampling, self._pool, gpu_bytes, self._others)
        # Before the model loads: a mistake here should not cost minutes.
        self._params = self._sampling_params(self._sampling)
        every = [self._params, *map(self._sampling_params, self._others)]
        for params in every:
            check_requests(params, None)
        known = known_engine_args()  # a vLLM without an argument of ours goes without it
        values = {name: value for name, value in defaults.items() if known is None or name in known}
        values |= model.engine
        if not os.path.isdir(model.source) and "://" not in model.source:
            values["load_format"] = hub_load_format(model)
        if self._task.pools:
            values["runner"] = "pooling"
        elif self._task.name == "score" and "max_num_batched_tokens" not in model.engine:
            batched = values.get("max_num_batched_tokens", SCORED_TOKENS)
            values["max_num_batched_tokens"] = min(batched, SCORED_TOKENS)
        if parser := constraining_parser((self._sampling, *self._others)):
            values["reasoning_parser"] = parser
            self._knows_reasoning = True
        if model.lora is not None:
            values |= {"enable_lora": True, "max_lora_rank": _lora_rank(model.lora, values)}
            self._lora = _lora_request(model.lora)
        args = AsyncEngineArgs(**values, **structured_args((self._sampling, *self._others), values))
        compiles = compile_key(_vllm_version(), _device_name(), values)
        one_rank = self._model.gpus_per_engine == 1  # several do not end their compilation at once
        with start_turn(
            self._pool,
            values,
            compiles,
            lambda: one_rank and "compile_s" in vllm_log.told_since(starts, starts_offset),
        ):
            constructed_at = time.time()
            # LLM_CLASS: the numbers of `vllm.LLM` for this device where the user gives none; for
            # max_num_batched_tokens 4,096 on a CPU and 16,384 on an H200, where AsyncLLM alone would take 2,048.
            # Not a local of this thread's frames: tracebacks of failed optional imports would keep it alive.
            self._llm = AsyncLLM.from_engine_args(
                args,
                usage_context=UsageContext.LLM_CLASS,
                stat_loggers=[_step_watch(self._note_tokens, self._cache_use)],
            )
        try:
            for params in every:
                check_requests(params, self._llm.tokenizer)
        except EngineStartError:
            last_reference, self._llm = [self._llm], None
            _shut_down(last_reference)
            raise
        told = vllm_log.told_since(starts, starts_offset)
        self._start_parts = _start_parts(told, self._llm.vllm_config, own_import_s, constructed_at)
        self._family = psutil.Process().children(recursive=True)
        self._last_token_at = time.monotonic()
        if not _is_fast(self._llm.tokenizer):
            self._params.detokenize = True

    def _note_tokens(self, count: int) -> None:
        self._last_token_at = time.monotonic()
        self._output_tokens += count

    # ── Reasons ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _start_reason(self, error: Exception) -> str:
        reason = vllm_log.reason_since(self._log, self._log_offset) or one_line(error)
        hint = ""
        if "out of memory" in reason.lower() or "OutOfMemory" in reason:
            hint = (
                " (lower model.engine.gpu_memory_utilization or max_model_len, or raise tensor_parallel_size)"
            )
        return f"model {self._model.source!r} does not start: {reason[:600]}{hint}"

    def _death_reason(self) -> str:
        reason = vllm_log.reason_since(self._log, self._log_offset)
        return f"vLLM's engine process died: {reason[:600]}" if reason else "vLLM's engine process died"


def _start_parts(
    told: dict[str, float], config: Any, own_import_s: float, constructed_at: float
) -> StartParts:
    """What vLLM's log tells of the start; 0 for what its configuration leaves out."""
    imported_at = told.get("engine_imported_at")
    compilation = config.compilation_config
    return StartParts(
        import_s=None if imported_at is None else own_import_s + max(0.0, imported_at - constructed_at),
        weights_s=told.get("weights_s"),
        compile_s=told.get("compile_s", None if int(compilation.mode or 0) else 0.0),
        graphs_s=told.get("graphs_s", None if compilation.cudagraph_mode.value else 0.0),
    )


def hub_load_format(model: ModelSettings) -> str:
    """What vLLM loads a hub model's weights by: never `auto` or `hf`, which would take pickles too.

    As vLLM's `auto` does, Mistral's own format where the repository has it.
    """
    given = load_format(model.engine)
    if given not in ("auto", "hf"):
        return given
    return "mistral" if given == "auto" and _has_mistral_files(model) else "safetensors"


def _has_mistral_files(model: ModelSettings) -> bool:
    try:
        from vllm.transformers_utils.repo_utils import list_filtered_repo_files

        return bool(
            list_filtered_repo_files(
                model.source,
                allow_patterns=["consolidated*.safetensors"],
                revision=model.revision,
                token=model.engine.get("hf_token"),
            )
        )
    except (ImportError, TypeError, ValueError, OSError):
        return False  # a helper of vLLM's own, which may move: then as for all other models


def _lora_request(lora: LoraSettings) -> Any:
    """For all requests of the engine; `lora.source` is a folder by now."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name="adapter", lora_int_id=1, lora_path=lora.source)


def _lora_rank(lora: LoraSettings, values: Mapping[str, Any]) -> int:
    """The least `max_lora_rank` of vLLM's that holds the adapter, unless the job says one."""
    rank = lora_rank(Path(lora.source))
    return int(values.get("max_lora_rank") or next((r for r in _LORA_RANKS if r >= rank), rank))


def _shut_down(last_reference: list[Any]) -> None:
    """End the engine's processes and drop the engine, whose `__del__` would complain at interpreter exit."""
    last_reference.pop().shutdown()
    multiprocessing.active_children()  # reaps the ended ones
    gc.collect()


def _kv_tokens(cache_config: Any) -> int | None:
    """What EngineCore reports of its KV cache when it is ready (0.26 to 0.32); None for a model that has none.

    Its own figure where it gives one: for hybrid models blocks × block size is too much.
    """
    tokens = getattr(cache_config, "kv_cache_size_tokens", None)
    if tokens is None:
        tokens = (cache_config.num_gpu_blocks or 0) * (cache_config.block_size or 0)
    return int(tokens) or None


def _step_watch(note_tokens: Callable[[int], None], cache_use: CacheUse) -> Any:
    """A stat logger that counts tokens and looks at the KV cache, in the place of vLLM's Prometheus one and its cost."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class StepWatch(PrometheusStatLogger):  # type: ignore[misc]  # vLLM adds its own unless it finds this class
        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            # Called for each step's outputs, also with FINAL_ONLY, where a request's tokens are seen only at its end.
            if iteration_stats is not None and iteration_stats.num_generation_tokens:
                note_tokens(iteration_stats.num_generation_tokens)
            if scheduler_stats is not None:
                cache_use.kv_cache_usage = scheduler_stats.kv_cache_usage
                prefixes = scheduler_stats.prefix_cache_stats
                if prefixes is not None:
                    cache_use.prefix_queries += prefixes.queries
                    cache_use.prefix_hits += prefixes.hits

        def log(self) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

        def record_sleep_state(self, *args: Any, **kwargs: Any) -> None:
            pass

    return StepWatch


def _is_fast(tokenizer: Any) -> bool:
    """Whether `pipelines.detokenize` can make the engine's text; the same test as in vLLM's detokenizer."""
    from transformers import TokenizersBackend

    return tokenizer is None or isinstance(tokenizer, TokenizersBackend)


def _device_name() -> str:
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else str(current_platform.get_device_name())


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__).split("+")[0]
