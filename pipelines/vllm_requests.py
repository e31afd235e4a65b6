"""What is asked of vLLM and what it answers: settings into its parameters, its outputs into `pipelines.engine`'s.

Imports vLLM, as `vllm_engine` does, and nothing of it before the engine starts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.engine import Answer, Sample
from pipelines.errors import EngineStartError, RowError, ShardError
from pipelines.settings import SamplingSettings
from pipelines.task import Task

#: What is made of answers once they are there.
PARSERS = ("reasoning_parser", "tool_call_parser")
#: What one request may have in vLLM's engine process: of 128 places for stop ids the model's own take some; and
#: VLLM_MAX_BAD_WORDS_TOTAL_TOKENS.
MOST_STOP_IDS, MOST_BAD_TOKENS = 100, 1024


def sampling_params(sampling: SamplingSettings) -> Any:
    """vLLM's SamplingParams for all requests of the job; seed and max_tokens may differ, see `VLLMEngine.generate`."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    columns = {"max_tokens_column", "params_column"}
    ours = {"seed", *columns, "output_schema", "structured_outputs", "repairs", *PARSERS}
    values = sampling.model_dump(exclude=ours)
    try:
        params = SamplingParams(
            **values,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Bad words are turned into ids beforehand and need no text; a structured answer is checked as it comes.
            detokenize=bool(sampling.stop) or sampling.is_structured,
            structured_outputs=(
                StructuredOutputsParams(
                    json=sampling.output_schema,
                    **(sampling.structured_outputs.model_dump() if sampling.structured_outputs else {}),
                )
                if sampling.is_structured
                else None
            ),
            flat_logprobs=sampling.logprobs is not None,
        )
    except Exception as error:  # a VLLMValidationError, which is a ValueError up to 0.26; or pydantic's
        raise EngineStartError(f"sampling: {one_line(error)}") from error
    # vLLM copies the parameters of each request; a deep copy takes 40 µs, a shallow one 2. What the copies share are
    # the stop ids that vLLM adds, the same for every request.
    params.skip_clone = True
    return params


def row_params(
    sampling: SamplingSettings,
    job: SamplingSettings,
    make: Callable[[SamplingSettings], Any],
    tokenizer: Any,
) -> Any:
    """What `make` makes of `sampling`, which rows' own parameters are in, fit for requests. Raises RowError."""
    try:
        params = make(sampling)
        if sampling.include_stop_str_in_output != job.include_stop_str_in_output:
            params.detokenize = True  # `pipelines.detokenize` goes by the job's
        _check_bounds(params, tokenizer)
    except Exception as error:  # the job's own have passed: these are the row's
        text = f"params_column {sampling.params_column!r}: {one_line(error)}"
        raise RowError("invalid_request", text) from error
    return params


def check_requests(params: Any, tokenizer: Any) -> None:
    """Raise EngineStartError for vLLM's parameters of a job whose requests would end its engine process."""
    try:
        _check_bounds(params, tokenizer)
    except Exception as error:  # as of `sampling_params`
        raise EngineStartError(f"sampling: {one_line(error)}") from error


def _check_bounds(params: Any, tokenizer: Any) -> None:
    """What vLLM would find wrong in its engine process only, which ends of it. Raises ValueError."""
    count = len(params.stop_token_ids)
    if params.min_tokens and count > MOST_STOP_IDS:
        raise ValueError(f"{count} stop_token_ids; with min_tokens there may be {MOST_STOP_IDS}")
    if params.bad_words and tokenizer is not None:
        tried = params.clone()
        tried.update_from_tokenizer(tokenizer)
        count = sum(map(len, tried.bad_words_token_ids))
        if count > MOST_BAD_TOKENS:
            raise ValueError(f"bad_words of {count} tokens; they may have {MOST_BAD_TOKENS}")


def scoring_params() -> Any:
    """vLLM's SamplingParams for the log-probabilities of a prompt: it answers with one token, which nobody reads."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def pooling_params(task: Task) -> Any:
    """vLLM's PoolingParams for one request, which vLLM fills in."""
    from vllm.pooling_params import PoolingParams

    return PoolingParams(task=task.name, dimensions=task.dimensions, use_activation=task.use_activation)


def structured_args(samplings: Sequence[SamplingSettings], values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON without white space, wherever vLLM's fastest backend knows the schemas: else a model may write blanks for ever."""
    schemas = [sampling.output_schema for sampling in samplings if sampling.output_schema is not None]
    if not schemas or "structured_outputs_config" in values:
        return {}
    from vllm.config import StructuredOutputsConfig
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if any(has_xgrammar_unsupported_json_features(schema) for schema in schemas):
        return {}
    config = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    return {"structured_outputs_config": config}


def constraining_parser(samplings: Sequence[SamplingSettings]) -> str | None:
    """The parser of reasoning that an engine needs to hold constraints for what follows it; None where it needs none."""
    return next(
        (one.reasoning_parser for one in samplings if one.reasoning_parser and one.is_structured), None
    )


def reasoning_options(reasons: bool, variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an engine that knows a parser of reasoning is told about one request.

    `reasons`: whether its answer is read by that parser; else constraints hold from its first token on, as a judge's do.
    """
    if not reasons:
        return {"reasoning_ended": True}
    return {"reasoning_parser_kwargs": {"chat_template_kwargs": dict(variables or {})}}


def generated(output: Any, params: Any, began: float, image_tokens: int = 0) -> Answer:
    """vLLM's RequestOutput. Raises ShardError for an answer that did not come to its end."""
    _check_ended(output)
    samples = [
        Sample(
            token_ids=array("i", completion.token_ids),
            text=completion.text if params.detokenize else None,
            finish_reason=completion.finish_reason,
            logprobs=None if completion.logprobs is None else _logprob_rows(completion.logprobs),
        )
        for completion in output.outputs
    ]
    metrics = output.metrics  # with n > 1 those of the sample that ended last
    # EngineCore's clock is CLOCK_MONOTONIC, the same for all processes of a host; `arrival_time` is wall clock.
    first = metrics.first_token_ts if metrics is not None else 0.0
    return Answer(
        samples=samples,
        cached_tokens=output.num_cached_tokens or 0,
        ttft_s=max(0.0, first - began) if first > 0 else None,
        preemptions=getattr(metrics, "num_preemptions", 0),  # since 0.32
        image_tokens=image_tokens,
    )


def pooled(output: Any, labels: Mapping[int, str] | None, image_tokens: int = 0) -> Answer:
    """vLLM's PoolingRequestOutput. `labels`: a classifier's names of its classes; None for vectors. Raises ShardError."""
    if error := getattr(output, "error", None):  # since 0.32
        raise ShardError(f"vLLM ended a request with {error}")
    values = output.outputs.data.float().cpu().numpy()
    text = None
    if labels is not None:
        likeliest = int(values.argmax())
        text = labels.get(likeliest, f"LABEL_{likeliest}")
    return Answer.of_values(values, text, output.num_cached_tokens or 0, image_tokens)


def scored(output: Any, image_tokens: int = 0) -> Answer:
    """vLLM's RequestOutput for `scoring_params`: at each position but the first the prompt's own token. Raises ShardError."""
    _check_ended(output)
    flat = output.prompt_logprobs
    values = [flat.logprobs[start] for start in flat.start_indices[1:]]
    return Answer.of_values(
        np.asarray(values, np.float32),
        cached_tokens=output.num_cached_tokens or 0,
        image_tokens=image_tokens,
    )


def _check_ended(output: Any) -> None:
    for completion in output.outputs:
        if completion.finish_reason not in ("stop", "length"):
            raise ShardError(f"vLLM ended a request with finish_reason {completion.finish_reason!r}")


def _logprob_rows(flat: Any) -> list[dict[str, Any]]:
    """vLLM's FlatLogprobs as `contracts.LOGPROBS_TYPE`: at each position the sampled token, then the alternatives."""
    ids, values = flat.token_ids, flat.logprobs
    return [
        {
            "token_id": ids[start],
            "logprob": values[start],
            "top": [{"token_id": ids[i], "logprob": values[i]} for i in range(start + 1, end)],
        }
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True)
    ]


def one_line(error: object) -> str:
    """The message of an exception without pydantic's decoration and line breaks."""
    text = str(error).split("[type=", 1)[0]
    if "validation error" in text:
        text = text.split("\n", 1)[-1]
    return " ".join(text.replace("Value error, ", "").split()) or type(error).__name__
