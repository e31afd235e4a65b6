"""What the platform's policy (`pipelines.policy`) says of a whole job."""

from __future__ import annotations

from jobs.spec import JobSpec
from pipelines.errors import SpecError
from pipelines.policy import model_problems, output_problems, pool_problems, read_policy
from pipelines.settings import PoolSettings


def check_job(spec: JobSpec) -> None:
    """Raise SpecError, one line for each thing that is not allowed, or for a policy that cannot be read."""
    policy = read_policy()
    _refuse(
        [problem for model in spec.models.values() for problem in model_problems(policy, model)]
        + [problem for one in spec.pools for problem in pool_problems(policy, one.model, one.pool)]
        + output_problems(policy, spec.output.path, spec.output.storage_options)
    )


def check_pool(spec: JobSpec, settled: PoolSettings) -> None:
    """The same for the pool once it has numbers for `auto`."""
    _refuse(pool_problems(read_policy(), spec.model, settled))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise SpecError("\n".join(problems))
