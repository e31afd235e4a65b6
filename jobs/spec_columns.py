"""The columns that a job names: which are read, and which mistakes show once the input's are known."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.contracts import result_schema
from pipelines.errors import SpecError
from pipelines.filter import compile_filter
from pipelines.prompt_columns import prompt_columns as columns_of_prompt
from pipelines.prompt_columns import prompt_type_problems
from pipelines.row_params import params_type_problem
from pipelines.schema import wanted_columns
from pipelines.settings import PromptSettings
from pipelines.step_checks import check_steps

if TYPE_CHECKING:
    from jobs.spec import JobSpec


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


def columns_of_images(spec: JobSpec) -> tuple[frozenset[str], frozenset[str]]:
    """(columns of the input that hold images of some prompt, those that hold messages, which may hold some).

    Steps call them by other names: `output.rename` and the steps before may have given them.
    """
    prompts: list[tuple[PromptSettings, int]] = [(spec.prompt, -1)] if spec.prompt else []
    prompts += [(step.asks.asked_prompt, at) for at, step in enumerate(spec.steps) if step.asks]
    images = (_of_input(spec, prompt.images_column, at) for prompt, at in prompts)
    messages = (_of_input(spec, prompt.messages_column, at) for prompt, at in prompts)
    return frozenset().union(*images), frozenset().union(*messages)


def _of_input(spec: JobSpec, column: str | None, at: int) -> set[str]:
    """The columns of the input that have become the one that the step at this place (-1: the job's own prompt) calls so; of what a
    step computes there are none."""
    names = set() if column is None else {column}
    if at < 0:
        return names
    for step in reversed(spec.steps[:at]):
        made: dict[str, tuple[str, ...]] = {}
        if step.explode is not None:
            made[step.explode.into] = step.explode.columns or (
                (step.explode.column,) if step.explode.column else ()
            )
        elif step.gather is not None:
            made = {name: (source,) for source, name in step.gather.columns.items()}
        names = {source for name in names for source in made.get(name, (name,))}
    renamed = {name: source for source, name in spec.output.rename.items()}
    return {renamed.get(name, name) for name in names}


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
        read = read_columns(spec)
        problems += collisions(spec, [name for name in known if read is None or name in read])
    if not problems:
        read = _read_schema(spec, schema)
        prompted = spec.prompt is not None
        answers = result_schema(read, spec.output, spec.sampling, prompted=prompted)
        problems += check_steps(spec.steps, answers)
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)))


def _read_schema(spec: JobSpec, schema: pa.Schema) -> pa.Schema:
    read = read_columns(spec)
    return schema if read is None else pa.schema([field for field in schema if field.name in read])


def read_columns(spec: JobSpec) -> list[str] | None:
    """What is read where `input.columns` says so; None: all columns."""
    wanted = wanted_columns(spec.input, needed_columns(spec))
    return None if wanted is None else list(wanted)


def collisions(spec: JobSpec, carried: list[str]) -> list[str]:
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


def _prompt_columns(spec: JobSpec) -> list[tuple[str, str]]:
    return columns_of_prompt(spec.prompt, spec.sampling) if spec.prompt else []


def _type_problems(spec: JobSpec, schema: pa.Schema) -> list[str]:
    problems = prompt_type_problems(spec.prompt, schema) if spec.prompt else []
    name = spec.sampling.max_tokens_column
    if name in schema.names and not _is_whole(schema.field(name).type):
        problems.append(
            f"sampling.max_tokens_column: {name!r} holds {schema.field(name).type} values, not whole numbers"
        )
    name = spec.sampling.params_column
    if name is not None and name in schema.names:
        problem = params_type_problem(name, schema.field(name).type)
        problems += [] if problem is None else [f"sampling.params_column: {problem}"]
    return problems


def _unknown_column(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown column {name!r}; did you mean {near[0]!r}?"
    return f"unknown column {name!r}; there are: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}"


def _is_whole(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_null(type_))
