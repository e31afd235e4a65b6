"""What a job is: the validated job file.

`jobs.loading` makes a `JobSpec` of YAML, `jobs.spec_checks` tells the mistakes that show before any file is opened, and
`jobs.spec_columns.check_against_schema` holds it against the columns that the input really has.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, PositiveInt, field_validator, model_validator

from jobs.limits import BudgetSettings
from jobs.schedule import ScheduleSettings
from jobs.spec_checks import problems_of
from pipelines.ask_settings import AskStep
from pipelines.contracts import extra_fields, result_fields
from pipelines.generations import by_engines
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
from pipelines.step_settings import StepSettings, step_names
from pipelines.task import GENERATE

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
        problems = problems_of(self)
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
    def images_columns(self) -> dict[str, tuple[str, ModelSettings]]:
        """The columns of images and the models that are to take them, by the keys which say so."""
        own = {"prompt": (self.prompt, self.model)} if self.prompt else {}
        asked = {
            f"{key}.{step.key_of('prompt')}": (step.asked_prompt, step.model or self.model)
            for key, step in self.asking_steps.items()
        }
        return {
            f"{key}.images_column": (prompt.images_column, model)
            for key, (prompt, model) in {**own, **asked}.items()
            if prompt.images_column is not None
        }

    @property
    def models(self) -> dict[str, ModelSettings]:
        """Every model of the job, by its key in messages; the job's own, `model`, first."""
        steps = {f"{key}.model": step.model for key, step in self.asking_steps.items() if step.model}
        return {"model": self.model, **steps}

    @property
    def pools(self) -> tuple[JobSpec, ...]:
        """For each pool of engines, in the order in which shards pass through them, the job with its model and pool."""
        asked = [(self.model, self.pool, GENERATE, self.sampling)] if self.prompt else []
        asked += [
            (step.model or self.model, step.pool or self.pool, step.task, step.asked_sampling)
            for step in self.asking_steps.values()
        ]
        return tuple(
            self.model_copy(update={"model": model, "pool": pool, "sampling": sampling})
            for (model, pool, _, sampling), *_ in by_engines(asked, lambda one: one[:3])
        )

    @property
    def result_columns(self) -> tuple[str, ...]:
        """The columns that Dray adds to the input's."""
        fields = result_fields(prompted=self.prompt is not None)
        return tuple(field.name for field in (*fields, *extra_fields(self.output, self.sampling)))
