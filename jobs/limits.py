"""`budget`: how much a job may use before its run stops, cleanly and to be resumed.

Output tokens and GPU hours count over all runs of the output, the deadline for each run. Parts tell of the tokens, the
ledger of the GPU hours; of a run that was killed before it could write its totals the parts tell both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt, field_validator

from jobs.durations import seconds_of
from jobs.metering import gpu_seconds_of_runs
from pipelines.errors import LimitReached
from pipelines.part import Part
from pipelines.settings import Settings
from pipelines.shard_stats import Provenance

if TYPE_CHECKING:  # `jobs.spec` takes its settings from here
    from jobs.ledger import Run


class BudgetSettings(Settings):
    """How much the job may use. A run that reaches a limit stops as `dray cancel` would: shards in flight may finish."""

    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """GPU hours of all runs of this output together; null: no limit."""
    max_output_tokens: PositiveInt | None = None
    """Generated tokens of the output's answers, of all runs together, without those of answers that were reused; counted when a
    shard is committed; null: no limit."""
    deadline: str | None = None
    """When a run stops: a date and time with its zone (`2026-11-23T06:00:00+01:00`), or a duration from the run's
    start (`90m`, `8h`, `2d`); null: never."""

    @field_validator("deadline")
    @classmethod
    def _known_form(cls, deadline: str | None) -> str | None:
        if deadline is not None:
            deadline_of(deadline, 0.0)
        return deadline


def deadline_of(text: str, started_at: float) -> float:
    """Unix time of a deadline. Raises ValueError."""
    seconds = seconds_of(text)
    if seconds:
        return started_at + seconds
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None:
        raise ValueError(
            f"expected a date and time with a zone (2026-11-23T06:00:00+01:00) or a duration (90m, 8h, 2d), got {text!r}"
        )
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone: write {text}Z for UTC, or {text}+01:00")
    return moment.timestamp()


class Limits:
    """Says when one run has reached a limit of its job."""

    def __init__(self, budget: BudgetSettings, output: str, clock: Callable[[], float] = time.time) -> None:
        """`output`: its URL, for messages. The deadline counts from now."""
        self._budget, self._output, self._clock = budget, output, clock
        self._deadline = deadline_of(budget.deadline, clock()) if budget.deadline else None
        self._tokens, self._gpu_s = 0, 0.0

    @property
    def count_earlier(self) -> bool:
        """Whether `add_earlier` makes a difference."""
        return self._budget.max_gpu_hours is not None or self._budget.max_output_tokens is not None

    def add_earlier(
        self, parts: Iterable[Part], runs: Iterable[Run], run_id: str, gpus_per_engine: float
    ) -> None:
        """Count what the output's other runs have used. `gpus_per_engine`: this run's, for older parts of runs without totals."""
        origins: list[Provenance] = []
        for part in parts:
            self._tokens += part.footer.stats.tokens_generated
            origins += (part.footer.provenance, *(one.provenance for one in part.footer.retries))
        self._gpu_s += gpu_seconds_of_runs(
            {run.run_id: run.usage.gpu_s for run in runs if run.usage is not None and run.run_id != run_id},
            (origin for origin in origins if origin.run_id != run_id),
            gpus_per_engine,
        )

    def reached(self, output_tokens: int, gpu_s: float) -> LimitReached | None:
        """The limit that this run's use so far reaches, together with the earlier runs'."""
        budget, tokens, hours = self._budget, self._tokens + output_tokens, (self._gpu_s + gpu_s) / 3600
        if budget.max_output_tokens is not None and tokens >= budget.max_output_tokens:
            return self._error(
                "max_output_tokens",
                f"{tokens:,} output tokens of {budget.max_output_tokens:,} are generated",
                "max_output_tokens=N",
            )
        if budget.max_gpu_hours is not None and hours >= budget.max_gpu_hours:
            return self._error(
                "max_gpu_hours",
                f"{hours:,.2f} GPU hours of {budget.max_gpu_hours:g} are used",
                "max_gpu_hours=N",
            )
        if self._deadline is not None and self._clock() >= self._deadline:
            when = datetime.fromtimestamp(self._deadline, UTC)
            return self._error(
                "deadline",
                f"{budget.deadline} has come ({when:%Y-%m-%d %H:%M:%S} UTC)",
                "deadline=8h",
            )
        return None

    def _error(self, name: str, what: str, more: str) -> LimitReached:
        return LimitReached(
            f"budget.{name}: {what}; committed shards are kept in {self._output}: "
            f"the same command with budget.{more} takes up the rest, or with budget.{name}=null for no such limit"
        )
