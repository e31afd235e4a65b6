"""A job's generations: the times that a model answers. The job's own prompt is the first, each `generate` or `judge` step
one more.

    prompt ─► answers ─► steps ─► prompt of a `generate` step ─► answers ─► steps ─► part

Each has the steps that follow it, up to the next generation. Consecutive ones with the same model and pool share
engines: a shard stays with its engine until another model's turn comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.ask_settings import AskStep
from pipelines.contracts import Work
from pipelines.settings import ModelSettings, PoolSettings
from pipelines.step_settings import StepSettings, step_names


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One time that a model answers, and what is made of its answers."""

    index: int
    """0: the job's own."""
    name: str
    """Of the step that asks, in statistics and messages; `""` for the job's own."""
    work: Work
    """The job's, with this generation's prompt, model, sampling and pool."""
    step: AskStep | None
    """None for the job's own."""
    steps: tuple[StepSettings, ...]
    """Those after it, before the next generation."""
    step_names: tuple[str, ...]


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


def pools_of(work: Work) -> tuple[tuple[Generation, ...], ...]:
    """The generations of each pool of engines, in the order in which a shard passes through them."""

    def engines(generation: Generation) -> tuple[ModelSettings, PoolSettings]:
        return generation.work.model, generation.work.pool

    pools: list[tuple[Generation, ...]] = []
    for generation in generations_of(work):
        if pools and engines(pools[-1][0]) == engines(generation):
            pools[-1] = (*pools[-1], generation)
        else:
            pools.append((generation,))
    return tuple(pools)


def with_pools(work: Work, pools: Sequence[PoolSettings]) -> Work:
    """The job with these settings for its pools, one for each of `pools_of`."""
    settled = dict(zip((pool[0].index for pool in pools_of(work)), pools, strict=True))
    of = {g.index: settled[pool[0].index] for pool in pools_of(work) for g in pool}
    index = itertools.count(1)
    steps = tuple(step if step.asks is None else step.asking(pool=of[next(index)]) for step in work.steps)
    return replace(work, pool=of[0], steps=steps)
