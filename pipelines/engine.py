"""The seam to an inference engine: what the generate stage asks of it, and which one a job gets."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import RowError
from pipelines.images import Image
from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings
from pipelines.task import GENERATE, Task

#: A prompt: int32 as it lies in an Arrow column, or any sequence of ints.
TokenIds = npt.NDArray[np.int32] | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class StartParts:
    """What an engine's start went to, in seconds; None where the engine does not tell, 0 where there was none of it.

    The rest of `EngineInfo.start_s` is processes starting, memory profiling and the KV cache.
    """

    import_s: float | None = None
    """Importing the engine's code, in this process and then in the engine's own, whose start is in it."""
    weights_s: float | None = None
    """Loading the weights; of several ranks the slowest."""
    compile_s: float | None = None
    """torch.compile, or loading what an earlier start compiled."""
    graphs_s: float | None = None
    """Capturing CUDA graphs, in whole seconds as vLLM tells it."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Known once the engine has started."""

    name: str
    """Engine and version, `vllm 0.32.0`, or `simulated`."""
    device: str
    """GPU name, or `cpu`."""
    max_model_len: int
    """Most tokens of prompt and answer together."""
    max_num_seqs: int
    """Most requests that the engine runs at once."""
    kv_tokens: int | None = None
    """Tokens of prompts and answers that its KV cache holds, over all requests; None: not known, or no bound."""
    start_s: float
    """Seconds from the call of `start` to ready."""
    ready_at: float
    """Unix time at which it was ready."""
    start_parts: StartParts = StartParts()


@dataclass(slots=True)
class CacheUse:
    """What an engine tells of its KV cache; zeros where it tells nothing."""

    kv_cache_usage: float = 0.0
    """Share of its blocks that hold tokens of running requests, 0 to 1."""
    prefix_queries: int = 0
    """Prompt tokens looked up so far."""
    prefix_hits: int = 0
    """Those of them that were found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of the n answers to a request."""

    token_ids: array[int]
    """All generated tokens, the stop token included; C ints ("i"): an eighth of a list's memory, and none of it for the
    garbage collector to visit."""
    text: str | None
    """Set only where the engine had to detokenise (stop strings, a slow tokenizer)."""
    finish_reason: str
    """`stop` or `length`."""
    logprobs: list[dict[str, Any]] | None = None
    """One `contracts.LOGPROBS_TYPE` struct per token, where asked for."""
    values: npt.NDArray[np.float32] | None = None
    """What other tasks than `generate` give instead of tokens: of `embed` the vector, of `classify` the probability of each
    class (`text` is the name of the likeliest), of `score` the log-probability of each prompt token but the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the engine returned for one prompt."""

    samples: Sequence[Sample]
    """In the order of their sample index."""
    cached_tokens: int
    ttft_s: float | None
    """Seconds from the request to the first token, where the engine tells."""
    preemptions: int = 0
    image_tokens: int = 0
    """Tokens by which the prompt's images made it longer."""

    @classmethod
    def of_values(
        cls,
        values: npt.NDArray[np.float32],
        text: str | None = None,
        cached_tokens: int = 0,
        image_tokens: int = 0,
    ) -> Answer:
        """One sample without tokens: what other tasks than `generate` give."""
        sample = Sample(token_ids=array("i"), text=text, finish_reason="stop", values=values)
        return cls(samples=[sample], cached_tokens=cached_tokens, ttft_s=None, image_tokens=image_tokens)


class Engine(Protocol):
    """One engine. All requests share one event loop, which need not be `start`'s."""

    async def start(self) -> EngineInfo:
        """Load the model. Raises EngineStartError."""

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
        """Answer one prompt. Cancelling the call aborts the request inside the engine.

        `max_tokens` and `sampling`: if not those that the engine was opened with; of requests that are sampled alike the same
        object. `variables`: the chat template's own ones, which may say whether the model reasons. `images`: given where the
        prompt has some, in the order of their places in `token_ids`.

        Raises RowError when the engine refuses this request, EngineDied when the engine is gone, EngineStartError when
        what it loads with the first request does not load.
        """

    async def encode(
        self, request_id: str, token_ids: TokenIds, task: Task, *, images: Sequence[Image] = ()
    ) -> Answer:
        """Pool one prompt, by an engine that was opened for such a task: one sample, of `values`. Else as `generate`."""

    async def score(self, request_id: str, token_ids: TokenIds, *, images: Sequence[Image] = ()) -> Answer:
        """How likely the prompt is in the model's eyes: one sample, of `values`. Else as `generate`."""

    @property
    def last_token_at(self) -> float:
        """`time.monotonic()` of the latest token of any request; of the start where there was none."""

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, of requests in flight too; of pooled prompts their own."""

    @property
    def cache_use(self) -> CacheUse:
        """As of the engine's latest step."""

    async def stop(self) -> None:
        """End the engine and every process it started. Safe to call twice, and before `start`."""

    def kill(self) -> None:
        """End every process of the engine at once, also of one that hangs or is half dead; blocks until they are gone."""


def check_prompt(token_ids: TokenIds, max_model_len: int, *, answered: bool = True) -> list[int]:
    """The prompt as plain ints, checked before any engine sees it. Raises RowError. `answered`: a token is to follow it.

    vLLM relies on it: an id that is no integer ends the thread on which its engine process takes requests, and all
    later ones hang; a negative id gets through to the embedding before 0.32, which kills a GPU engine.
    """
    try:
        array_ids = (
            token_ids if isinstance(token_ids, np.ndarray) else np.frombuffer(array("q", token_ids), "q")
        )
    except (TypeError, OverflowError) as error:
        raise RowError("invalid_request", f"token ids must be integers: {error}") from error
    ids: list[int] = array_ids.tolist()
    if not ids:
        raise RowError("empty_prompt", "the prompt has no tokens")
    if len(ids) + answered > max_model_len:
        counted = ", which counts prompt and answer" if answered else ""
        raise RowError(
            "prompt_too_long",
            f"the prompt has {len(ids)} tokens and max_model_len is {max_model_len}{counted}",
        )
    if (lowest := int(array_ids.min())) < 0:
        raise RowError("invalid_request", f"Token id {lowest} is out of vocabulary")
    return ids


def open_engine(
    model: ModelSettings,
    sampling: SamplingSettings,
    pool: PoolSettings,
    others: Sequence[SamplingSettings] = (),
    task: Task = GENERATE,
) -> Engine:
    """The engine that `model.backend` names, not started yet.

    `others`: what `generate` will be asked for besides; `task`: what else, by whatever of it an engine must be fit for.
    """
    if model.backend == "simulated":
        from pipelines.simulated_engine import SimulatedEngine

        return SimulatedEngine(model, sampling, others)
    from pipelines.vllm_engine import VLLMEngine

    return VLLMEngine(model, sampling, pool, others, task)
