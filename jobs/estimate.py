"""`dray estimate`: what a job will take, from a random sample of its rows, answered by one engine on this machine.

    tokens      the sample's mean × rows, see `jobs.intervals`; rows that the filter drops or that fail count as 0
    wall time   engine start + output tokens × seconds per token / engines
    GPU hours   GPUs per engine × (engines × engine start + output tokens × seconds per token)

Seconds per output token are those of one engine with the sample in flight, prompts included, measured in `WINDOWS` windows of
equally many tokens between the first and the last tenth. Writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.engines import Engines, engines_of, hardware_here
from jobs.intervals import Interval, mean_of_windows, share_of, total_of
from jobs.loading import LoadedJob
from jobs.proposal import input_schema, work_of
from jobs.sampling import RowSample, sample_rows
from jobs.spec_columns import needed_columns
from pipelines.answer_columns import prompt_tokens as prompt_lengths
from pipelines.answering import Answering, Started
from pipelines.contracts import Shard, Work
from pipelines.engine import Engine, EngineInfo, open_engine
from pipelines.errors import SpecError
from pipelines.listing import list_files
from pipelines.model_folder import check_model
from pipelines.prepare import Prepare
from pipelines.stage import Parcel
from pipelines.structured import checking_parser

WINDOWS = 5
#: Seconds between two looks at the engine's count of tokens.
_LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one engine made of the sample."""

    info: EngineInfo
    prompt_tokens: npt.NDArray[np.float64]
    """Of each drawn row; 0 where it has no answer."""
    output_tokens: npt.NDArray[np.float64]
    failed: int
    seconds: float
    """From the first request to the last answer."""
    s_per_token: Interval | None
    """None where nothing was generated."""
    steady: bool
    """Whether the speed could be measured in windows."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the whole job will take."""

    job: str
    rows_read: int
    rows_sampled: int
    rows_kept: Interval
    """Rows that pass the filter."""
    failed: int
    """Sampled rows without an answer."""
    prompt_tokens: Interval
    output_tokens: Interval
    wall_s: Interval
    gpu_hours: Interval
    cost_usd: Interval | None
    engines: int
    engine: str
    engine_start_s: float
    output_tokens_per_s: float | None
    """Of one engine."""
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
            ("wall time, minutes", self.wall_s.apply(lambda s: s / 60), ",.1f"),
            ("GPU hours", self.gpu_hours, ",.2f"),
        ]
        if self.cost_usd is not None:
            lines.append(("cost, US dollars", self.cost_usd, ",.2f"))
        for title, interval, form in lines:
            table.add_row(title, *(format(x, form) for x in (interval.value, interval.low, interval.high)))
        speed = (
            "" if self.output_tokens_per_s is None else f", {self.output_tokens_per_s:,.0f} output tokens/s"
        )
        engines = "1 engine" if self.engines == 1 else f"{self.engines} engines"
        return Group(
            table,
            escape(
                f"from {self.rows_sampled:,} sampled rows ({self.failed:,} failed) on one engine ({self.engine}{speed}); "
                f"the job has {engines}"
            ),
            *(f"note: {escape(note)}" for note in self.notes),
        )


def estimate(job: LoadedJob, *, rows: int = 200, seed: int = 0) -> Estimate:
    """Sample `rows` rows (`seed` says which), answer them, and extrapolate.

    Raises BadInput for what is wrong with the job, EngineStartError where its engine does not start here.
    """
    spec = job.spec
    check_model(spec.model)
    if spec.asking_steps:
        raise SpecError(
            f"{next(iter(spec.asking_steps))}: `dray estimate` measures the job's own prompt; estimate the job without the "
            "steps that ask a model, and each generate or judge step as a job of its own"
        )
    engines = engines_of(spec, hardware_here(spec))
    if engines.hardware.gpus is None:
        raise SpecError(
            "`dray estimate` measures on this machine, which has no GPU that the job could use: run it on a GPU host, or "
            "with pool.device=cpu"
        )
    files = list_files(spec.input, needed_columns(spec))
    work = work_of(job, input_schema(spec, files), fingerprint="", run_id="estimate")
    sample = sample_rows(files, work, rows, seed)
    if sample.drawn < min(2, sample.population):
        raise SpecError(f"--rows: {rows} rows tell nothing of the others; take 2 or more")
    return _extrapolated(job, engines, sample, measure(sample, work, engines), seed)


def _extrapolated(
    job: LoadedJob, engines: Engines, sample: RowSample, measured: Measured, seed: int
) -> Estimate:
    spec, pool = job.spec, engines.pool
    assert pool.engines_per_gpu != "auto"
    count, hours = pool.most_engines, 1 / 3600
    gpus = spec.model.gpus_per_engine / pool.engines_per_gpu if engines.hardware.gpus else 0.0
    # The filter's share is known, not sampled, where the input was read through, and where there is none.
    known = spec.input.filter is None or sample.population != sample.rows_read
    kept = (
        Interval(*[float(sample.population)] * 3)
        if known
        else share_of(len(sample.table), sample.drawn, sample.population).apply(
            lambda x: x * sample.rows_read
        )
    )
    prompt = total_of(measured.prompt_tokens, sample.population, seed)
    output = total_of(measured.output_tokens, sample.population, seed)
    start = measured.info.start_s
    busy = output * measured.s_per_token if measured.s_per_token else Interval(0.0, 0.0, 0.0)
    gpu_hours = busy.apply(lambda s: gpus * (count * start + s) * hours)
    price = spec.cost.gpu_hour_usd
    return Estimate(
        job=spec.name,
        rows_read=sample.rows_read,
        rows_sampled=sample.drawn,
        rows_kept=kept,
        failed=measured.failed,
        prompt_tokens=prompt,
        output_tokens=output,
        wall_s=busy.apply(lambda s: start + s / count),
        gpu_hours=gpu_hours,
        cost_usd=None if price is None else gpu_hours.apply(lambda x: x * price),
        engines=count,
        engine=f"{measured.info.name} on {measured.info.device}",
        engine_start_s=start,
        output_tokens_per_s=1 / measured.s_per_token.value if measured.s_per_token else None,
        notes=tuple(_notes(sample, measured, pool.engines_per_gpu)),
    )


def _notes(sample: RowSample, measured: Measured, engines_per_gpu: int) -> list[str]:
    """What makes times worse estimates than tokens."""
    notes, info = [], measured.info
    if info.name == "simulated":
        notes.append("SIMULATED: neither lengths nor times are a model's")
    if len(sample.table) < 2 * info.max_num_seqs:
        notes.append(
            f"the engine runs {info.max_num_seqs:,} requests at once: {2 * info.max_num_seqs:,} or more --rows would fill "
            "it; with fewer, times are over-estimated"
        )
    if engines_per_gpu > 1:
        notes.append(
            f"measured with one engine alone; {engines_per_gpu} share a GPU, so times are under-estimated"
        )
    if not measured.steady:
        notes.append(
            "too little was generated to tell how steady the speed is: times are given within a factor of 2"
        )
    return notes


# ── The sample on one engine ─────────────────────────────────────────────────────────────────────────────────────


def measure(sample: RowSample, work: Work, engines: Engines) -> Measured:
    """Answer the sampled rows. Raises EngineStartError, EngineDied, and what is wrong with the job's prompts."""
    prompts = Prepare(work).builder.build(sample.table)
    parcel = Parcel(shard=Shard(ordinal=0, id="estimate", spans=(), rows=None, bytes=0), prompts=prompts)
    engine = open_engine(work.model, work.sampling, engines.pool)
    return asyncio.run(_measured(engine, parcel, prompts, sample, work))


async def _measured(
    engine: Engine, parcel: Parcel, prompts: pa.Table, sample: RowSample, work: Work
) -> Measured:
    try:
        info = await engine.start()
        started, parser = Started.of(engine, info, work), checking_parser(work)
        answering = Answering(parcel, work, started, itertools.count(), priority=0, parser=parser)
        marks: list[tuple[float, int]] = []
        watcher = asyncio.create_task(_watch(engine, marks))
        began = time.monotonic()
        try:
            await answering.run(answering.answerable)
            seconds = time.monotonic() - began
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        generations = answering.parcel(attempt=1, engine_deaths=0).generations
    finally:
        await engine.stop()
    assert generations is not None
    prompt_tokens, output_tokens = np.zeros(sample.drawn), np.zeros(sample.drawn)
    lengths = prompt_lengths(prompts, generations).to_pylist()
    answered = set()
    columns = (generations[name].to_pylist() for name in ("row", "token_ids"))
    for row, ids, length in zip(*columns, lengths, strict=True):
        if ids is not None:
            answered.add(row)
            prompt_tokens[row] = length
            output_tokens[row] += len(ids)
    speed, steady = _speed(marks, float(output_tokens.sum()), seconds)
    return Measured(
        info=info,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        failed=len(prompts) - len(answered),
        seconds=seconds,
        s_per_token=speed,
        steady=steady,
    )


async def _watch(engine: Engine, marks: list[tuple[float, int]]) -> None:
    while True:
        marks.append((time.monotonic(), engine.output_tokens))
        await asyncio.sleep(_LOOK_S)


def _speed(marks: list[tuple[float, int]], tokens: float, seconds: float) -> tuple[Interval | None, bool]:
    """Seconds per output token, and whether windows tell its spread."""
    if not tokens:
        return None, False
    counts = np.array([count for _, count in marks], float)
    times = np.array([at for at, _ in marks])
    rising = np.flatnonzero(np.diff(counts, prepend=-1.0) > 0)
    edges = counts[-1] * np.linspace(0.1, 0.9, WINDOWS + 1) if len(counts) else np.empty(0)
    if len(rising) < 4 * WINDOWS:
        mean = seconds / tokens
        return Interval(mean, mean / 2, mean * 2), False
    at = np.interp(edges, counts[rising], times[rising])
    windows = mean_of_windows(np.diff(at) / np.diff(edges))
    # The tail of a sample, where the engine runs empty, is no part of a long run's speed.
    return windows, True
