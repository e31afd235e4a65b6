"""Mistakes of a job file that show before any file is opened: sections that do not agree, and what does not compile."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from jobs.places import overlap
from jobs.spec_columns import collisions, read_columns
from pipelines.answer_parsers import parser_problems
from pipelines.ask_settings import GenerateStep
from pipelines.engine_args import check_engine_args
from pipelines.errors import ModelError, SpecError
from pipelines.filter import compile_filter
from pipelines.prompt_columns import templates
from pipelines.settings import ModelSettings, SamplingSettings
from pipelines.step_checks import order_problems
from pipelines.step_settings import ASKING
from pipelines.task import GENERATE, Task
from pipelines.template import Template

if TYPE_CHECKING:
    from jobs.spec import JobSpec


def problems_of(spec: JobSpec) -> list[str]:
    """What is wrong with a job, one line each."""
    problems = (
        _place_problems(spec)
        + _prompt_problems(spec)
        + _source_problems(spec)
        + _engine_problems(spec)
        + _parser_problems(spec)
        + _pool_problems(spec)
    )
    return problems or _column_problems(spec)  # which compiles templates and the filter


#: What only answers to the job's own prompt can have.
_OF_ANSWERS = (
    "n",
    "logprobs",
    "max_tokens_column",
    "params_column",
    "output_schema",
    "structured_outputs",
    "reasoning_parser",
    "tool_call_parser",
)


def _place_problems(spec: JobSpec) -> list[str]:
    paths = [spec.input.path] if isinstance(spec.input.path, str) else spec.input.path
    return [
        f"output.path: {spec.output.path} {how} input.path {path}; the job would read its own output: "
        f"choose a folder apart from the input"
        for path in paths
        if (how := overlap(input_path=path, output_path=spec.output.path))
    ]


def _column_problems(spec: JobSpec) -> list[str]:
    """Mistakes among `input.columns`, `output.columns` and `output.rename` that need no schema."""
    problems = []
    read = read_columns(spec)
    carried = read if spec.output.columns == "all" else list(spec.output.columns)
    if read is not None and carried is not None:
        problems += [
            f"output.columns: {name!r} is not among the columns that are read ({', '.join(read)})"
            for name in carried
            if name not in read
        ]
    for name in spec.output.rename:
        if carried is not None and name not in carried:
            where = "the columns that are read" if spec.output.columns == "all" else "output.columns"
            problems.append(f"output.rename: {name!r} is not among {where} ({', '.join(carried)})")
    return problems + collisions(spec, carried if carried is not None else list(spec.output.rename))


def _prompt_problems(spec: JobSpec) -> list[str]:
    """What a job without a prompt cannot do without, and what it cannot have; and a conversation that is none."""
    name = spec.output.conversation
    if spec.prompt is not None:
        problems = []
        if name is not None and spec.prompt.chat is False:
            problems.append("output.conversation: needs the chat template; remove `prompt.chat: false`")
        if name is not None and spec.result_columns.count(name) > 1:
            problems.append(f"output.conversation: {name!r} is a result column already; choose another name")
        if name is not None and spec.prompt.images_column is not None:
            problems.append(
                "output.conversation: the column holds text only; leave it out, or prompt.images_column"
            )
        return problems
    if not spec.asking_steps:
        return [
            "prompt: missing; say how a row becomes a prompt, or give steps of which one asks a model "
            f"({', '.join(ASKING)})"
        ]
    default = SamplingSettings()
    problems = [
        f"sampling.{name}: the job has no prompt that it could be for; each generate step has a sampling of its own"
        for name in _OF_ANSWERS
        if getattr(spec.sampling, name) != getattr(default, name)
    ]
    if spec.output.provenance:
        problems.append("output.provenance: it is the job's own prompt's, and the job has none")
    if name is not None:
        problems.append(
            "output.conversation: it is the job's own prompt's, and the job has none; a generate step has a "
            "`conversation` of its own"
        )
    return problems


def _source_problems(spec: JobSpec) -> list[str]:
    """Templates and filters that do not compile."""
    problems = []
    sources = templates(spec.prompt) if spec.prompt else []
    for key, step in spec.asking_steps.items():
        sources += [(f"{key}.{step.key_of(name)}", source) for name, source in templates(step.asked_prompt)]
    for key, source in sources:
        try:
            Template(source, key)
        except SpecError as error:
            problems.append(str(error))
    if spec.input.filter:
        try:
            compile_filter(spec.input.filter)
        except SpecError as error:
            problems.append(str(error))
    for name, one in spec.named_steps.items():
        if one.filter is not None:
            try:
                compile_filter(one.filter.where, f"steps.{name}.where")
            except SpecError as error:
                problems.append(str(error))
        if one.dedup is not None and spec.input.on_changed == "replace":
            problems.append(
                f"steps.{name}: a record that was dropped as a duplicate of one in a file that changes later cannot come "
                "back: set input.on_changed: refuse, or leave dedup to a second job"
            )
    problems += order_problems(spec.steps)
    return problems


def _engine_problems(spec: JobSpec) -> list[str]:
    problems = []
    for key, model in spec.models.items():
        for name, value in model.engine.items():
            try:
                check_engine_args({name: value})
            except ModelError as error:
                problems.append(str(error) if key == "model" else f"{key}: {error}")
        if key != "model" and not (os.path.isabs(model.source) or model.revision):
            problems.append(
                f"{key}.revision: give the commit of {model.source!r}; only the job's own model is pinned by itself"
            )
    for key, step in spec.asking_steps.items():
        problems += _runner_problems(
            f"{key}.model" if step.model else "model", step.model or spec.model, step.task
        )
    if spec.prompt is not None:
        problems += _runner_problems("model", spec.model, GENERATE)
    return list(dict.fromkeys(problems))


def _runner_problems(key: str, model: ModelSettings, task: Task) -> list[str]:
    """A model that is to be hosted otherwise than its task needs; `key` is where it stands in the job file."""
    problems = []
    runner = model.engine.get("runner", "auto")
    wanted = "pooling" if task.pools else "generate"
    if runner not in ("auto", wanted):
        problems.append(f"{key}.engine.runner: {task.name} needs {wanted!r}, not {runner!r}; leave it out")
    if task.pools and model.lora is not None:
        problems.append(
            f"{key}.lora: {task.name} takes no adapter; merge it into the model, or give the step a model of its own"
        )
    return problems


def _parser_problems(spec: JobSpec) -> list[str]:
    """Parsers that the installed vLLM does not have; two for the answers of one model, since an engine knows one; and calls
    of tools that a conversation would lose."""
    asked = {"sampling": (spec.model, spec.sampling)} if spec.prompt else {}
    told = {"output": (spec.output.conversation, spec.sampling)}
    for key, step in spec.asking_steps.items():
        asked[f"{key}.sampling"] = (step.model or spec.model, step.asked_sampling)
        if isinstance(step, GenerateStep):
            told[key] = (step.conversation, step.sampling)
    problems = [
        f"{key}.conversation: holds role and content, and calls of tools have no place in it; leave out one of it and "
        "sampling.tool_call_parser, and make the messages from the columns in a map step"
        for key, (conversation, sampling) in told.items()
        if conversation is not None and sampling.tool_call_parser is not None
    ]
    first: dict[str, tuple[str, str]] = {}
    for key, (model, sampling) in asked.items():
        problems += parser_problems(key, sampling, model.engine)
        if (parser := sampling.reasoning_parser) is None:
            continue
        other, before = first.setdefault(model.model_dump_json(), (key, parser))
        if parser != before:
            problems.append(
                f"{key}.reasoning_parser: {parser!r}, but {other}.reasoning_parser is {before!r}, and one model reasons in one way"
            )
    return problems


def _pool_problems(spec: JobSpec) -> list[str]:
    problems = []
    for one in spec.pools:
        gpus, packed = one.model.gpus_per_engine, one.pool.engines_per_gpu
        if packed not in ("auto", 1) and gpus > 1:
            problems.append(
                f"pool.engines_per_gpu: {packed} engines on one GPU, but one engine takes {gpus} GPUs"
            )
        if len(spec.pools) > 1 and not isinstance(one.pool.replicas, int):
            problems.append(
                f"pool.replicas: a job with several models needs a number for each pool, not {one.pool.replicas!r}"
            )
    return problems
