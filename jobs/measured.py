"""What one engine of each pool makes of a sample of rows: tokens of every generation, and the speed at which it read or wrote them.

The seconds per token are of one engine with the sample in flight, prompts included, measured in `WINDOWS` windows of equally many
tokens between the first and the last tenth.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.in_process import answer_all
from jobs.intervals import Interval, mean_of_windows
from jobs.sampling import RowSample
from pipelines.advance import row_of
from pipelines.answer_columns import prompt_tokens
from pipelines.answering import Answering
from pipelines.contracts import Shard, Work
from pipelines.engine import Engine, EngineInfo
from pipelines.generations import Generation
from pipelines.place import input_rows
from pipelines.prepare import Prepare
from pipelines.stage import Parcel

WINDOWS = 5
#: Seconds between two looks at the engine's count of tokens.
_LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the sample took of one generation."""

    generation: Generation
    info: EngineInfo
    """Of the engine, which other generations may share."""
    prompt_tokens: npt.NDArray[np.float64]
    """Of each drawn row, all its records together; 0 where it was not asked about, or has no answer."""
    output_tokens: npt.NDArray[np.float64]
    failed: frozenset[int]
    """Places of the rows with a request that has no answer."""
    s_per_token: Interval | None
    """Of `tokens`; None where there are none."""
    steady: bool
    """Whether the speed could be measured in windows."""

    @property
    def tokens(self) -> npt.NDArray[np.float64]:
        """What takes the engine's time: output, or the prompts of a generation that writes nothing."""
        return self.output_tokens if self.generation.writes else self.prompt_tokens


def measure(sample: RowSample, work: Work) -> list[Measured]:
    """Answer the sampled rows, in all generations. `work`: with the settled pools of a run.

    Raises EngineStartError, EngineDied, and what is wrong with the job's prompts.
    """
    parcel = Parcel(shard=Shard(ordinal=0, id="estimate", spans=(), rows=None, bytes=0))
    parcel = Prepare(work).prompted(parcel, sample.table)
    # By place: the input may have a column `row_id` of its own.
    ids = sample.table.column(sample.table.num_columns - 3).to_pylist()
    places = {row_id: place for place, row_id in enumerate(ids)}
    found: list[Measured] = []

    async def answer(generation: Generation, answering: Answering) -> Parcel:
        engine, marks = answering.started.engine, list[tuple[float, int]]()
        watcher = asyncio.create_task(_watch(engine, marks))
        began = time.monotonic()
        try:
            await answering.run(answering.answerable)
            seconds = time.monotonic() - began
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        answered = answering.parcel(attempt=1, engine_deaths=0)
        of = _rows_of(answered.prompts, places)
        found.append(_measured(generation, answering, answered, of, sample.drawn, marks, seconds))
        return answered

    asyncio.run(answer_all(parcel, work, answer))
    return found


def _rows_of(prompts: pa.Table | None, places: dict[str, int]) -> list[int]:
    """The place in the sample of the row that each prompt is about."""
    assert prompts is not None
    ids = pa.chunked_array([[row_of(one) for one in prompts["row_id"].to_pylist()]], pa.string())
    return [places[row_id] for row_id in input_rows(ids).to_pylist()]


def _measured(
    generation: Generation,
    answering: Answering,
    answered: Parcel,
    of: list[int],
    drawn: int,
    marks: list[tuple[float, int]],
    seconds: float,
) -> Measured:
    assert answered.generations is not None
    prompts, outputs = np.zeros(drawn), np.zeros(drawn)
    lengths = prompt_tokens(answered.prompts, answered.generations).to_pylist()
    columns = (answered.generations[name].to_pylist() for name in ("row", "sample_index", "token_ids"))
    failed = set()
    for request, sample, ids, length in zip(*columns, lengths, strict=True):
        if ids is None:
            failed.add(of[request])
            continue
        prompts[of[request]] += length if sample == 0 else 0
        outputs[of[request]] += len(ids)
    tokens = outputs if generation.writes else prompts
    speed, steady = _speed(marks if generation.writes else [], float(tokens.sum()), seconds)
    return Measured(
        generation=generation,
        info=answering.started.info,
        prompt_tokens=prompts,
        output_tokens=outputs,
        failed=frozenset(failed),
        s_per_token=speed,
        steady=steady,
    )


async def _watch(engine: Engine, marks: list[tuple[float, int]]) -> None:
    while True:
        marks.append((time.monotonic(), engine.output_tokens))
        await asyncio.sleep(_LOOK_S)


def _speed(marks: list[tuple[float, int]], tokens: float, seconds: float) -> tuple[Interval | None, bool]:
    """Seconds per token, and whether windows tell its spread."""
    if not tokens:
        return None, False
    counts = np.array([count for _, count in marks], float)
    times = np.array([at for at, _ in marks])
    rising = np.flatnonzero(np.diff(counts, prepend=-1.0) > 0)
    if len(rising) < 4 * WINDOWS:
        mean = seconds / tokens
        return Interval(mean, mean / 2, mean * 2), False
    # Of what this generation adds: another one may have had the engine before.
    edges = counts[0] + (counts[-1] - counts[0]) * np.linspace(0.1, 0.9, WINDOWS + 1)
    at = np.interp(edges, counts[rising], times[rising])
    windows = mean_of_windows(np.diff(at) / np.diff(edges))
    # The tail of a sample, where the engine runs empty, is no part of a long run's speed.
    return windows, True
