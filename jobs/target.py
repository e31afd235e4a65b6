"""What the command line's first argument names: a job file, or the output of a job."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.loading import LoadedJob, load
from jobs.output import SPEC, read_spec
from pipelines.errors import SpecError
from pipelines.storage import Storage


def is_job_file(target: str) -> bool:
    """Job files end in .yaml or .yml; everything else is an output path."""
    return target.endswith((".yaml", ".yml"))


def job_of(target: str, overrides: Sequence[str] = (), date: str | None = None) -> LoadedJob:
    """The job of a job file, or the one that an output was written by, with overrides.

    `date` as for `load`; an output whose path has run variables keeps those that it was begun with.
    """
    if is_job_file(target):
        return load(target, overrides, date=date)
    storage = Storage(target)
    record = read_spec(storage)
    if record is None:
        raise SpecError(f"{target} is neither a job file (*.yaml) nor the output of a job (it has no {SPEC})")
    own = record.get("variables") or {}  # an older Dray stored none
    if own and date is not None:
        raise SpecError(f"{target} is the output of {own['date']}: name the job file to run another date")
    return load(record["spec"], [f"output.path={storage.url()}", *overrides], own, date=date)


def output_of(target: str) -> Storage:
    """The output of a job file, or the output itself."""
    if is_job_file(target):
        output = load(target).spec.output
        return Storage(output.path, output.storage_options)
    return Storage(target)
