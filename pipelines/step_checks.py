"""Whether each step finds the columns that it needs: told when planning, before any engine starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from pipelines.arrow_types import is_text
from pipelines.ask_settings import FIRST, SECOND, JudgeStep
from pipelines.dedup import is_comparable
from pipelines.errors import SpecError
from pipelines.filter import compile_filter
from pipelines.prompt_columns import prompt_columns, prompt_type_problems
from pipelines.step_settings import ExplodeStep, StepSettings, element_type, nested_type, step_names


def order_problems(steps: Sequence[StepSettings]) -> list[str]:
    """What is wrong with the order of the steps, one line each; needs no schema."""
    names = step_names(tuple(steps))
    return [
        f"steps.{name}: dedup must be the last step, {after} follows it: give the steps behind it to a second job whose "
        "input.path is this job's data/"
        for (step, name), after in zip(zip(steps, names, strict=True), names[1:], strict=False)
        if step.dedup is not None
    ]


def check_steps(steps: tuple[StepSettings, ...], answers: pa.Schema) -> list[str]:
    """What is wrong with the columns that the steps need and add, one line each. `answers`: the schema without steps."""
    problems = []
    schema = answers
    for step, name in zip(steps, step_names(steps), strict=True):
        problems += [f"steps.{name}: {problem}" for problem in _problems(step, schema)]
        if step.filter is not None and not problems:
            try:
                compile_filter(step.filter.where, f"steps.{name}.where").check(schema)
            except SpecError as error:
                problems.append(str(error))
        added = step.adds(schema)
        schema = pa.schema([*schema, *(column for column in added if column.name not in schema.names)])
    return problems


def _problems(step: StepSettings, schema: pa.Schema) -> list[str]:
    problems = [
        f"adds the column {name!r}, which is there already"
        for name in step.adds(schema).names
        if name in schema.names
    ]
    if step.judge is not None:
        problems += _judge_problems(step.judge, schema)
        schema = pa.schema([*schema, *((name, pa.string()) for name in _compared(step.judge))])
    if step.asks is not None and not problems:
        prompt = step.asks.asked_prompt
        problems += [
            f"{step.asks.key_of(key)}: {_no_column(column, schema)}"
            for key, column in prompt_columns(prompt)
            if column not in schema.names
        ]
        problems += prompt_type_problems(prompt, schema)
    if step.score is not None:
        problems += _type_problem("answer", step.score.answer, schema, "text", is_text)
    if step.parse is not None:
        problems += _type_problem("column", step.parse.column, schema, "text", pa.types.is_string)
    if step.select is not None:
        problems += _type_problem(
            "by",
            step.select.by,
            schema,
            "numbers or booleans",
            lambda type_: (
                pa.types.is_boolean(type_) or pa.types.is_integer(type_) or pa.types.is_floating(type_)
            ),
        )
    if step.explode is not None:
        problems += _explode_problems(step.explode, schema)
    if step.gather is not None:
        problems += [
            f"columns: {_no_column(column, schema)}"
            for column in step.gather.columns
            if nested_type(schema, column) is None
        ]
    if step.dedup is not None:
        for column in step.dedup.columns:
            if step.dedup.method == "minhash":
                problems += _type_problem("columns", column, schema, "text", is_text)
            else:
                problems += _type_problem(
                    "columns", column, schema, "text, numbers, booleans or dates", is_comparable
                )
    return problems


def _explode_problems(explode: ExplodeStep, schema: pa.Schema) -> list[str]:
    if explode.column is not None and element_type(schema, explode.column) is None:
        type_ = nested_type(schema, explode.column)
        if type_ is None:
            return [f"column: {_no_column(explode.column, schema)}"]
        return [f"column: {explode.column!r} holds {type_} values, not lists"]
    columns = explode.columns or ()
    problems = [f"columns: {_no_column(column, schema)}" for column in columns if column not in schema.names]
    types = {column: schema.field(column).type for column in columns if column in schema.names}
    if len(set(types.values())) > 1:
        found = ", ".join(f"{column!r} {type_}" for column, type_ in types.items())
        problems.append(f"columns: must be of one type; found {found}")
    return problems


def _judge_problems(judge: JudgeStep, schema: pa.Schema) -> list[str]:
    problems = [
        f"columns: {_no_column(column, schema)}"
        for column in judge.columns
        if column.partition(".")[0] not in schema.names
    ]
    for column in judge.compare or ():
        problems += _type_problem("compare", column, schema, "text", is_text)
    problems += [
        f"compare: the two answers are the prompt's {FIRST!r} and {SECOND!r}, and there is a column {name!r} already: "
        f"rename it, for example output.rename.{name}=input_{name}"
        for name in _compared(judge)
        if name in schema.names
    ]
    if judge.compare and judge.prompt and judge.prompt.template:
        shown = {column for _, column in prompt_columns(judge.prompt)}
        problems += [
            f"prompt.template: does not show {{{{ {name} }}}}, one of the two answers that are compared"
            for name in _compared(judge)
            if name not in shown
        ]
    return problems


def _compared(judge: JudgeStep) -> tuple[str, ...]:
    """The columns that only the judge's prompt has."""
    return (FIRST, SECOND) if judge.compare else ()


def _type_problem(
    key: str, column: str, schema: pa.Schema, wanted: str, fits: Callable[[pa.DataType], bool]
) -> list[str]:
    if column not in schema.names:
        return [f"{key}: {_no_column(column, schema)}"]
    type_ = schema.field(column).type
    return [] if fits(type_) else [f"{key}: {column!r} holds {type_} values, not {wanted}"]


def _no_column(column: str, schema: pa.Schema) -> str:
    return f"there is no column {column!r} by then; there are {', '.join(schema.names[:16])}"
