"""`dray estimate`: what a job will take, from a random sample of its rows, answered by one engine of each pool on this machine.

    tokens      the sample's mean × rows, see `jobs.intervals`; rows that the filter drops or that fail count as 0
    pool busy   Σ over its generations (tokens × seconds per token) / engines
    wall time   longest engine start + the busiest pool's time, since all pools work at once
    GPU hours   Σ over pools (GPUs per engine × engines) × wall time, since a pool has its GPUs until the run ends

Tokens that take time are output tokens, and the prompts of generations that write nothing; `jobs.measured` has their speed.
Writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.engines import Engines, engines_of, hardware_here
from jobs.intervals import Interval, share_of, total_of
from jobs.loading import LoadedJob
from jobs.measured import Measured, measure
from jobs.proposal import input_schema, work_of
from jobs.sampling import RowSample, sample_rows
from jobs.spec_columns import needed_columns
from pipelines.errors import SpecError
from pipelines.generations import pools_of, with_pools
from pipelines.listing import list_files
from pipelines.model_folder import check_model

_NOTHING = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class OfGeneration:
    """What one of the job's generations will take."""

    name: str
    """Of the step that asks; `""` for the job's own prompt."""
    prompt_tokens: Interval
    output_tokens: Interval
    engines: int
    """Of its pool, which other generations may share."""
    engine: str
    tokens_per_s: float | None
    """Of one engine: output tokens, or those of prompts where nothing is written; None where there were none."""

    @property
    def title(self) -> str:
        return self.name or "prompt"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the whole job will take."""

    job: str
    rows_read: int
    rows_sampled: int
    rows_kept: Interval
    """Rows that pass the filter."""
    failed: int
    """Sampled rows with a request that has no answer."""
    prompt_tokens: Interval
    output_tokens: Interval
    wall_s: Interval
    gpu_hours: Interval
    cost_usd: Interval | None
    engines: int
    """Of all pools."""
    engine_start_s: float
    """The longest."""
    generations: tuple[OfGeneration, ...]
    """In their order; those before are the sums."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> RenderableType:
        """A table for the terminal."""
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{self.job}: {self.rows_read:,} rows")
        for title in ("estimate", "95 % from", "to"):
            table.add_column(title, justify="right")
        lines: list[tuple[str, Interval, str]] = [
            ("rows that pass the filter", self.rows_kept, ",.0f"),
            ("prompt tokens", self.prompt_tokens, ",.0f"),
            ("output tokens", self.output_tokens, ",.0f"),
            *self._of_each("prompt tokens"),
            *self._of_each("output tokens"),
            ("wall time, minutes", self.wall_s.apply(lambda s: s / 60), ",.1f"),
            ("GPU hours", self.gpu_hours, ",.2f"),
        ]
        if self.cost_usd is not None:
            lines.append(("cost, US dollars", self.cost_usd, ",.2f"))
        for title, interval, form in lines:
            table.add_row(title, *(format(x, form) for x in (interval.value, interval.low, interval.high)))
        job = "1 engine" if self.engines == 1 else f"{self.engines} engines"
        return Group(
            table,
            escape(
                f"from {self.rows_sampled:,} sampled rows ({self.failed:,} failed) on one engine "
                f"({'; '.join(map(self._measured_on, self.generations))}); the job has {job}"
            ),
            *(f"note: {escape(note)}" for note in self.notes),
        )

    def _of_each(self, what: str) -> list[tuple[str, Interval, str]]:
        """A line for each generation, where there are several."""
        several = self.generations if len(self.generations) > 1 else ()
        lines = [(one, getattr(one, what.replace(" ", "_"))) for one in several]
        return [(f"{what}, {one.title}", interval, ",.0f") for one, interval in lines if interval.value]

    def _measured_on(self, one: OfGeneration) -> str:
        name = f"{one.title}: " if len(self.generations) > 1 else ""
        kind = "output" if one.output_tokens.value else "prompt"
        return f"{name}{one.engine}" + (
            "" if one.tokens_per_s is None else f", {one.tokens_per_s:,.0f} {kind} tokens/s"
        )


def estimate(job: LoadedJob, *, rows: int = 200, seed: int = 0) -> Estimate:
    """Sample `rows` rows (`seed` says which), answer them, and extrapolate.

    Raises BadInput for what is wrong with the job, EngineStartError where its engine does not start here.
    """
    spec = job.spec
    for one in spec.pools:
        check_model(one.model)
    pools = [engines_of(one, hardware_here(one)) for one in spec.pools]
    if any(engines.hardware.gpus is None for engines in pools):
        raise SpecError(
            "`dray estimate` measures on this machine, which has no GPU that the job could use: run it on a GPU host, or "
            "with pool.device=cpu"
        )
    files = list_files(spec.input, needed_columns(spec))
    work = work_of(job, input_schema(spec, files), fingerprint="", run_id="estimate")
    sample = sample_rows(files, work, rows, seed)
    if sample.drawn < min(2, sample.population):
        raise SpecError(f"--rows: {rows} rows tell nothing of the others; take 2 or more")
    work = with_pools(work, [engines.pool for engines in pools])
    measured = iter(measure(sample, work))
    by_pool = [[next(measured) for _ in pool] for pool in pools_of(work)]
    return _extrapolated(job, pools, sample, by_pool, seed)


def _extrapolated(
    job: LoadedJob,
    pools: Sequence[Engines],
    sample: RowSample,
    by_pool: Sequence[Sequence[Measured]],
    seed: int,
) -> Estimate:
    spec, measured = job.spec, [one for pool in by_pool for one in pool]

    def total(of: np.ndarray[Any, np.dtype[np.float64]]) -> Interval:
        return total_of(of, sample.population, seed)

    # The filter's share is known, not sampled, where the input was read through, and where there is none.
    known = spec.input.filter is None or sample.population != sample.rows_read
    kept = (
        Interval(*[float(sample.population)] * 3)
        if known
        else share_of(len(sample.table), sample.drawn, sample.population).apply(
            lambda x: x * sample.rows_read
        )
    )
    start = max(one.info.start_s for one in measured)
    busiest, gpus, generations = _NOTHING, 0.0, list[OfGeneration]()
    for engines, found in zip(pools, by_pool, strict=True):
        pool, count = engines.pool, engines.pool.most_engines
        assert pool.engines_per_gpu != "auto"
        if engines.hardware.gpus:
            gpus += found[0].generation.work.model.gpus_per_engine / pool.engines_per_gpu * count
        busy = _NOTHING
        for one in found:
            busy += total(one.tokens) * one.s_per_token if one.s_per_token else _NOTHING
            generations.append(
                OfGeneration(
                    name=one.generation.name,
                    prompt_tokens=total(one.prompt_tokens),
                    output_tokens=total(one.output_tokens),
                    engines=count,
                    engine=f"{one.info.name} on {one.info.device}",
                    tokens_per_s=1 / one.s_per_token.value if one.s_per_token else None,
                )
            )
        busiest = busiest.at_least(Interval(busy.value / count, busy.low / count, busy.high / count))
    wall = busiest.apply(lambda s: start + s)
    gpu_hours = wall.apply(lambda s: gpus * s / 3600)
    price = spec.cost.gpu_hour_usd
    return Estimate(
        job=spec.name,
        rows_read=sample.rows_read,
        rows_sampled=sample.drawn,
        rows_kept=kept,
        failed=len(frozenset[int]().union(*(one.failed for one in measured))),
        prompt_tokens=total(sum((one.prompt_tokens for one in measured), np.zeros(sample.drawn))),
        output_tokens=total(sum((one.output_tokens for one in measured), np.zeros(sample.drawn))),
        wall_s=wall,
        gpu_hours=gpu_hours,
        cost_usd=None if price is None else gpu_hours.apply(lambda x: x * price),
        engines=sum(engines.pool.most_engines for engines in pools),
        engine_start_s=start,
        generations=tuple(generations),
        notes=tuple(_notes(sample, measured, pools)),
    )


def _notes(sample: RowSample, measured: Sequence[Measured], pools: Sequence[Engines]) -> list[str]:
    """What makes times worse estimates than tokens."""
    notes, most = [], max(one.info.max_num_seqs for one in measured)
    if any(one.info.name == "simulated" for one in measured):
        notes.append("SIMULATED: neither lengths nor times are a model's")
    if len(sample.table) < 2 * most:
        notes.append(
            f"the engine runs {most:,} requests at once: {2 * most:,} or more --rows would fill "
            "it; with fewer, times are over-estimated"
        )
    packed = [engines.pool.engines_per_gpu for engines in pools if engines.pool.engines_per_gpu != 1]
    if packed:
        notes.append(f"measured with one engine alone; {packed[0]} share a GPU, so times are under-estimated")
    unasked = [one.generation.name or "prompt" for one in measured if one.s_per_token is None]
    if unasked:
        notes.append(
            f"no sampled row has an answer of {', '.join(unasked)}, which therefore counts as nothing: take more --rows"
        )
    if any(one.s_per_token and not one.steady for one in measured):
        notes.append(
            "too little was generated to tell how steady the speed is: times are given within a factor of 2"
        )
    return notes
