"""A job's generations: the times that a model is asked. The job's own prompt is the first, each step that asks a model
(`pipelines.ask_settings`) one more.

    prompt ─► answers ─► steps ─► prompt of a `generate` step ─► answers ─► steps ─► part

Each has the steps that follow it, up to the next generation. Consecutive ones with the same model, pool and kind of engine
share engines: a shard stays with its engine until another one's turn comes. A job without a prompt has a first generation that
asks nothing: its records are the input's rows, and its steps come before the first engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pipelines.ask_settings import AskStep, GenerateStep
from pipelines.contracts import Work
from pipelines.engine import Engine, open_engine
from pipelines.settings import ModelSettings, PoolSettings
from pipelines.step_settings import StepSettings, step_names
from pipelines.task import Task


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One time that a model answers, and what is made of its answers."""

    index: int
    """0: the job's own."""
    name: str
    """Of the step that asks, in statistics and messages; `""` for the job's own."""
    work: Work
    """The job's, with this generation's prompt, model, task, sampling and pool."""
    step: AskStep | None
    """None for the job's own."""
    steps: tuple[StepSettings, ...]
    """Those after it, before the next generation."""
    step_names: tuple[str, ...]

    @property
    def asks(self) -> bool:
        """Whether a model is asked at all."""
        return self.work.prompt is not None

    @property
    def writes(self) -> bool:
        """Whether texts come of it."""
        return self.asks and self.work.task.name == "generate"

    @property
    def conversation(self) -> str | None:
        """The column of what was asked and answered; None where the job does not want one."""
        if self.step is None:
            return self.work.output.conversation
        return self.step.conversation if isinstance(self.step, GenerateStep) else None

    @property
    def conversation_key(self) -> str | None:
        """The key of the job file that asks for `conversation`."""
        where = "output" if self.step is None else f"steps.{self.name}"
        return None if self.conversation is None else f"{where}.conversation"

    @property
    def parses(self) -> bool:
        """Whether reading its answers takes vLLM's parsers."""
        return self.writes and self.work.sampling.is_parsed


def generations_of(work: Work) -> tuple[Generation, ...]:
    """All generations of a job, in their order; at least one."""
    names = step_names(work.steps)
    starts = [place for place, step in enumerate(work.steps) if step.asks is not None]
    found = []
    for index, (start, end) in enumerate(itertools.pairwise([-1, *starts, len(work.steps)])):
        step = work.steps[start].asks if index else None
        own = (
            work
            if step is None
            else replace(
                work,
                prompt=step.asked_prompt,
                task=step.task,
                sampling=step.asked_sampling,
                model=step.model or work.model,
                pool=step.pool or work.pool,
            )
        )
        found.append(
            Generation(
                index=index,
                name=names[start] if index else "",
                work=own,
                step=step,
                steps=work.steps[start + 1 : end],
                step_names=names[start + 1 : end],
            )
        )
    return tuple(found)


Asked = TypeVar("Asked")


def by_engines(
    asked: Iterable[Asked], of: Callable[[Asked], tuple[ModelSettings, PoolSettings, Task]]
) -> tuple[tuple[Asked, ...], ...]:
    """Consecutive ones that share engines: those of the same model, pool and kind of engine."""

    def engines(one: Asked) -> tuple[ModelSettings, PoolSettings, str]:
        model, pool, task = of(one)
        return model, pool, task.engine

    return tuple(tuple(sharing) for _, sharing in itertools.groupby(asked, engines))


def pools_of(work: Work) -> tuple[tuple[Generation, ...], ...]:
    """The generations of each pool of engines, in the order in which a shard passes through them."""
    asking = (generation for generation in generations_of(work) if generation.asks)
    return by_engines(asking, lambda one: (one.work.model, one.work.pool, one.work.task))


def engine_of(pool: Sequence[Generation]) -> Engine:
    """The engine that does what all generations of a pool ask for, not started yet."""
    first, *others = (generation.work for generation in pool)
    scored = next((work.task for work in others if work.task.name == "score"), first.task)
    return open_engine(first.model, first.sampling, first.pool, [work.sampling for work in others], scored)


def with_pools(work: Work, pools: Sequence[PoolSettings]) -> Work:
    """The job with these settings for its pools, one for each of `pools_of`."""
    of = {g.index: pool for pool, asking in zip(pools, pools_of(work), strict=True) for g in asking}
    index = itertools.count(1)
    steps = tuple(step if step.asks is None else step.asking(pool=of[next(index)]) for step in work.steps)
    return replace(work, pool=pools[0], steps=steps)
