"""The models that `dray serve` answers for: a job file each, without what a batch brings itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.loading import load
from jobs.openai_job import given_by
from jobs.references import MASK
from pipelines.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What batches that ask for one model are run with."""

    name: str
    """By which requests name it."""
    job_file: str
    """The absolute path of a job file to extend."""
    overrides: tuple[str, ...] = ()


def served_models(given: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, ServedModel]:
    """By name. `given`: `JOB`, or `NAME=JOB`; without a name it is the job's `model.source`.

    Each is checked as part of a job, so that a mistake is found when the server starts. Raises SpecError, also for what a
    batch file would have to say.
    """
    found: dict[str, ServedModel] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        given_by(path, None, overrides)
        batch = {
            "name": "batch",
            "input": {"path": "requests.parquet"},
            "prompt": {"messages_column": "messages"},
            "output": {"path": "out"},
        }
        job = load({**batch, "extends": [os.path.abspath(path)]}, overrides)
        if MASK in json.dumps(job.raw):
            raise SpecError(
                f"--model {text}: a secret stands in {path}, and would in each batch's job: give it as ${{env:NAME}}"
            )
        name = name or job.spec.model.source
        if name in found:
            raise SpecError(f"--model {text}: {name} is served already; give it another name, as NAME={path}")
        found[name] = ServedModel(name=name, job_file=os.path.abspath(path), overrides=tuple(overrides))
    return found
