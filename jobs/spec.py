"""What a job is: the validated job file, and the mistakes that show before any file is opened.

`jobs.loading` makes a `JobSpec` of YAML; `check_against_schema` holds it against the columns that the input really has.
"""

from __future__ import annotations

import difflib
import os
import re
from itertools import groupby
from typing import Annotated

import pyarrow as pa
from pydantic import Field, PositiveInt, field_validator, model_validator

from jobs.limits import BudgetSettings
from jobs.places import overlap
from jobs.schedule import ScheduleSettings
from pipelines.answer_parsers import parser_problems
from pipelines.ask_settings import AskStep, GenerateStep
from pipelines.contracts import extra_fields, result_fields, result_schema
from pipelines.engine_args import check_engine_args
from pipelines.errors import ModelError, SpecError
from pipelines.filter import compile_filter
from pipelines.prompt_columns import prompt_columns as columns_of_prompt
from pipelines.prompt_columns import prompt_type_problems, templates
from pipelines.schema import wanted_columns
from pipelines.settings import (
    ErrorSettings,
    InputSettings,
    ModelSettings,
    Names,
    OutputSettings,
    PoolSettings,
    PromptSettings,
    ReuseSettings,
    SamplingSettings,
    Settings,
    ShardSettings,
)
from pipelines.step_checks import check_steps, order_problems
from pipelines.step_settings import ASKING, StepSettings, step_names
from pipelines.task import GENERATE, Task
from pipelines.template import Template

_ADDRESS = re.compile(r"local|auto|(ray://)?[\w.-]+:\d{1,5}|(ray://)?\[[0-9a-fA-F:.]+\]:\d{1,5}")


class ClusterSettings(Settings):
    """Which Ray cluster runs the job."""

    address: str = "local"
    """`local` starts Ray on this machine, reachable from it only; `auto`, `host:port` or `ray://host:port` joins a
    running cluster."""
    num_cpus: PositiveInt | None = None
    """CPU cores of a cluster started with `local`; default: all of the machine's."""
    num_gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a cluster started with `local`; default: all of the machine's."""
    metrics_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of this machine at which a cluster started with `local` tells Prometheus its metrics; default: any free one."""

    @field_validator("address")
    @classmethod
    def _known_form(cls, address: str) -> str:
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"expected local, auto, host:port or ray://host:port, got {address!r}")
        return address

    @model_validator(mode="after")
    def _size_of_own_cluster_only(self) -> ClusterSettings:
        own = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "metrics_port": self.metrics_port}
        given = [name for name, value in own.items() if value is not None]
        if self.address != "local" and given:
            raise ValueError(f"{' and '.join(given)}: only for address: local; a running cluster has its own")
        return self


class CostSettings(Settings):
    """What the job's GPUs cost, for reports, the ledger and estimates."""

    gpu_hour_usd: Annotated[float, Field(ge=0)] | None = None
    """US dollars for one GPU for one hour; null: no cost is shown."""


class ReportSettings(Settings):
    """What reports may show."""

    redact: Names = Field(default_factory=list)
    """Input columns whose values are never shown, for example `[customer, email]`: `[redacted]` stands in the examples of
    failed rows, and for error messages, which may quote a row. A list for many jobs may name columns that this one lacks."""


class JobSpec(Settings):
    """One job, complete and consistent."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Letters, digits, dots, dashes and underscores; stands in the ledger, in logs and metrics."""
    input: InputSettings
    """Where the rows come from."""
    prompt: PromptSettings | None = None
    """How a row becomes a prompt. Without it the job begins with its steps, one of which asks a model."""
    model: ModelSettings
    """Which model answers."""
    sampling: SamplingSettings = SamplingSettings()
    """How tokens are chosen."""
    output: OutputSettings
    """Where and how the dataset is written."""
    pool: PoolSettings = PoolSettings()
    """How many engines, and on what."""
    shards: ShardSettings = ShardSettings()
    """How the input is cut."""
    errors: ErrorSettings = ErrorSettings()
    """What may fail, and how often."""
    cluster: ClusterSettings = ClusterSettings()
    """Which Ray cluster runs the job."""
    cost: CostSettings = CostSettings()
    """What the job's GPUs cost."""
    report: ReportSettings = ReportSettings()
    """What reports may show."""
    schedule: ScheduleSettings | None = None
    """When the job runs by itself."""
    budget: BudgetSettings = BudgetSettings()
    """How much the job may use before a run stops."""
    reuse: ReuseSettings = ReuseSettings()
    """Answers that need not be asked for again."""
    steps: tuple[StepSettings, ...] = ()
    """What is made of the answers before they are written, in this order."""

    @model_validator(mode="after")
    def _sections_agree(self) -> JobSpec:
        problems = (
            _place_problems(self)
            + _prompt_problems(self)
            + _source_problems(self)
            + _engine_problems(self)
            + _parser_problems(self)
            + _pool_problems(self)
        )
        problems = problems or _column_problems(self)  # which compiles templates and the filter
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def functions(self) -> dict[str, str]:
        """The user's functions, `package.module:name`, by their key in the job file."""
        found = {"prompt.function": self.prompt.function if self.prompt else None}
        for name, step in self.named_steps.items():
            if step.map is not None:
                found[f"steps.{name}.function"] = step.map.function
            if step.asks is not None:
                found[f"steps.{name}.prompt.function"] = step.asks.asked_prompt.function
        return {key: function for key, function in found.items() if function is not None}

    @property
    def named_steps(self) -> dict[str, StepSettings]:
        """The steps by their names in statistics and messages."""
        return dict(zip(step_names(self.steps), self.steps, strict=True))

    @property
    def asking_steps(self) -> dict[str, AskStep]:
        """The generations after the job's own, by the key under which they stand in messages: `steps.NAME`."""
        return {f"steps.{name}": step.asks for name, step in self.named_steps.items() if step.asks}

    @property
    def models(self) -> dict[str, ModelSettings]:
        """Every model of the job, by its key in messages; the job's own, `model`, first."""
        steps = {f"{key}.model": step.model for key, step in self.asking_steps.items() if step.model}
        return {"model": self.model, **steps}

    @property
    def pools(self) -> tuple[JobSpec, ...]:
        """For each pool of engines, in the order in which shards pass through them, the job with its model and pool."""
        asked = [(self.model, self.pool, GENERATE.engine, self.sampling)] if self.prompt else []
        asked += [
            (step.model or self.model, step.pool or self.pool, step.task.engine, step.asked_sampling)
            for step in self.asking_steps.values()
        ]
        firsts = (next(sharing) for _, sharing in groupby(asked, key=lambda one: one[:3]))
        return tuple(
            self.model_copy(update={"model": model, "pool": pool, "sampling": sampling})
            for model, pool, _, sampling in firsts
        )

    @property
    def result_columns(self) -> tuple[str, ...]:
        """The columns that Dray adds to the input's."""
        fields = result_fields(prompted=self.prompt is not None)
        return tuple(field.name for field in (*fields, *extra_fields(self.output, self.sampling)))


def prompt_columns(spec: JobSpec) -> frozenset[str]:
    """Columns without which there is no prompt; a prompt function says nothing of its own."""
    return frozenset(name for key, name in _prompt_columns(spec) if key.startswith("prompt."))


def needed_columns(spec: JobSpec) -> frozenset[str]:
    """Columns that are read whatever `input.columns` says: those of the prompt, the filter and `id_column`.

    A prompt function takes the columns that it finds, so it adds none.
    """
    names = {name for _, name in _prompt_columns(spec)}
    if spec.input.filter:
        names |= compile_filter(spec.input.filter).columns
    if spec.input.id_column:
        names.add(spec.input.id_column)
    return frozenset(names)


def check_against_schema(spec: JobSpec, schema: pa.Schema) -> None:
    """Raise SpecError, one line per mistake, for columns that the input lacks or may not have.

    `schema` holds the input's columns, all of them or those that the job reads.
    """
    known = schema.names
    named = [("input.columns", name) for name in spec.input.columns or ()]
    named += [("input.id_column", spec.input.id_column)] if spec.input.id_column else []
    named += _prompt_columns(spec)
    named += [("output.rename", name) for name in spec.output.rename]
    named += [("output.columns", name) for name in spec.output.columns if spec.output.columns != "all"]
    problems = [f"{key}: {_unknown_column(name, known)}" for key, name in named if name not in known]
    if spec.input.filter:
        try:
            compile_filter(spec.input.filter).check(schema)
        except SpecError as error:
            problems.append(str(error))
    problems += _type_problems(spec, schema)
    if spec.output.columns == "all":
        read = _read_columns(spec)
        problems += _collisions(spec, [name for name in known if read is None or name in read])
    if not problems:
        read = _read_schema(spec, schema)
        prompted = spec.prompt is not None
        answers = result_schema(read, spec.output, spec.sampling, prompted=prompted)
        problems += check_steps(spec.steps, answers)
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)))


def _read_schema(spec: JobSpec, schema: pa.Schema) -> pa.Schema:
    read = _read_columns(spec)
    return schema if read is None else pa.schema([field for field in schema if field.name in read])


def _read_columns(spec: JobSpec) -> list[str] | None:
    """What is read where `input.columns` says so; None: all columns."""
    wanted = wanted_columns(spec.input, needed_columns(spec))
    return None if wanted is None else list(wanted)


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
    read = _read_columns(spec)
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
    return problems + _collisions(spec, carried if carried is not None else list(spec.output.rename))


def _collisions(spec: JobSpec, carried: list[str]) -> list[str]:
    """Columns of the output that would have one name: two of the input's, or one of them and a result column."""
    problems = []
    taken: dict[str, str] = {}
    for name in carried:
        target = spec.output.rename.get(name, name)
        if target in spec.result_columns:
            if name == target:
                problems.append(
                    f"output.rename: the input column {name!r} has the name of a result column; "
                    f"rename it, for example output.rename.{name}=input_{name}"
                )
            else:
                problems.append(f"output.rename: {name!r} cannot become {target!r}, a result column")
        elif target in taken:
            problems.append(f"output.rename: {taken[target]!r} and {name!r} would both become {target!r}")
        taken.setdefault(target, name)
    return problems


#: What only answers to the job's own prompt can have.
_OF_ANSWERS = (
    "n",
    "logprobs",
    "max_tokens_column",
    "output_schema",
    "structured_outputs",
    "reasoning_parser",
    "tool_call_parser",
)


def _prompt_problems(spec: JobSpec) -> list[str]:
    """What a job without a prompt cannot do without, and what it cannot have; and a conversation that is none."""
    name = spec.output.conversation
    if spec.prompt is not None:
        problems = []
        if name is not None and spec.prompt.chat is False:
            problems.append("output.conversation: needs the chat template; remove `prompt.chat: false`")
        if name is not None and spec.result_columns.count(name) > 1:
            problems.append(f"output.conversation: {name!r} is a result column already; choose another name")
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


def _prompt_columns(spec: JobSpec) -> list[tuple[str, str]]:
    return columns_of_prompt(spec.prompt, spec.sampling) if spec.prompt else []


def _type_problems(spec: JobSpec, schema: pa.Schema) -> list[str]:
    problems = prompt_type_problems(spec.prompt, schema) if spec.prompt else []
    name = spec.sampling.max_tokens_column
    if name in schema.names and not _is_whole(schema.field(name).type):
        problems.append(
            f"sampling.max_tokens_column: {name!r} holds {schema.field(name).type} values, not whole numbers"
        )
    return problems


def _unknown_column(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown column {name!r}; did you mean {near[0]!r}?"
    return f"unknown column {name!r}; there are: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}"


def _is_whole(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_null(type_))
