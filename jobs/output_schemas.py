"""`output_schema` of a job: the JSON Schemas of pydantic classes in the user's own packages, and what is wrong with any."""

from __future__ import annotations

import os
from typing import Any

from jobs.spec import JobSpec
from pipelines.code import load_function
from pipelines.errors import SpecError
from pipelines.output_schema import arrow_type_of, schema_problem
from pipelines.settings import SamplingSettings


def with_schemas(spec: JobSpec) -> JobSpec:
    """The job with a JSON Schema wherever `output_schema` names a class. Raises SpecError, one line per mistake."""
    problems: list[str] = []

    def resolved(sampling: SamplingSettings, key: str) -> SamplingSettings:
        try:
            schema = _schema(sampling.output_schema, key)
        except SpecError as error:
            problems.append(str(error))
            return sampling
        if schema is sampling.output_schema:
            return sampling
        return sampling.model_copy(update={"output_schema": schema})

    update: dict[str, Any] = {"sampling": resolved(spec.sampling, "sampling.output_schema")}
    steps = []
    for name, step in spec.named_steps.items():
        if step.generate is not None:
            sampling = resolved(step.generate.sampling, f"steps.{name}.sampling.output_schema")
            step = step.asking(sampling=sampling)
        steps.append(step)
    if problems:
        raise SpecError("\n".join(problems))
    return spec.model_copy(update={**update, "steps": tuple(steps)})


def json_columns(spec: JobSpec) -> list[str]:
    """A line for each `output_schema` that Arrow has no type for: its column holds JSON text."""
    samplings = {"sampling": spec.sampling}
    samplings |= {f"{key}.sampling": step.asked_sampling for key, step in spec.asking_steps.items()}
    lines = []
    for key, sampling in samplings.items():
        if isinstance(sampling.output_schema, dict):
            _, reason = arrow_type_of(sampling.output_schema)
            if reason is not None:
                lines.append(f"{key}.output_schema has {reason}: its column holds JSON text")
    return lines


def _schema(given: dict[str, Any] | str | None, key: str) -> dict[str, Any] | None:
    schema = given
    if isinstance(schema, str):
        # As for functions: the working directory, behind all other packages.
        found: Any = load_function(schema, (os.getcwd(),), key)
        if not hasattr(found, "model_json_schema"):
            raise SpecError(f"{key}: {schema} is no pydantic model")
        schema = found.model_json_schema()
    if schema is not None and (problem := schema_problem(schema)):
        raise SpecError(f"{key}: {problem}")
    return schema
