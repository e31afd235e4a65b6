"""The requests of one shard on a started engine, and its answers as a table."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipelines.admission import Gate
from pipelines.contracts import GENERATION_SCHEMA, Work
from pipelines.engine import Answer, Engine, EngineInfo
from pipelines.errors import EngineDied, RowError
from pipelines.histogram import Histogram
from pipelines.stage import Parcel


@dataclass(frozen=True)
class Started:
    """An engine that is ready, and the gate before it."""

    engine: Engine
    info: EngineInfo
    gate: Gate


class Answering:
    """One shard's way through the engine: all its prompts at once, or some at a time."""

    def __init__(
        self,
        parcel: Parcel,
        work: Work,
        started: Started,
        request_numbers: itertools.count[int],
        priority: int,
    ) -> None:
        assert parcel.prompts is not None
        self._parcel, self._prompts = parcel, parcel.prompts
        self._work, self._started = work, started
        self._numbers, self._priority = request_numbers, priority
        self._token_ids = self._prompts["token_ids"].combine_chunks()
        self._results: list[Answer | RowError | None] = [None] * len(self._prompts)
        self._latencies: list[float] = []
        self._began = time.monotonic()
        self._first_admitted: float | None = None

    @cached_property
    def row_ids(self) -> list[str]:
        """Of all rows, by position."""
        ids: list[str] = self._prompts["row_id"].to_pylist()
        return ids

    @cached_property
    def answerable(self) -> list[int]:
        """Positions of the rows that have a prompt."""
        return [row for row, valid in enumerate(self._token_ids.is_valid().to_pylist()) if valid]

    async def run(self, rows: Iterable[int]) -> None:
        """Answer the prompts at these positions. Raises what is not one row's fault, after aborting the rest."""
        gate = self._started.gate
        try:
            async with asyncio.TaskGroup() as group:
                for row in rows:
                    await gate.enter(self._priority)
                    self._first_admitted = self._first_admitted or time.monotonic()
                    # A callback, not a `finally`: a task that is cancelled before its first step never runs one.
                    group.create_task(self._row(row)).add_done_callback(lambda _: gate.leave())
        except* Exception as errors:  # noqa: BLE001 - re-raised as one
            # One cause is enough to fail the shard; an engine's death explains all the others.
            causes = list(_leaves(errors))
            raise next((e for e in causes if isinstance(e, EngineDied)), causes[0]) from None

    def fail(self, row: int, error: RowError) -> None:
        """A row that is not run."""
        self._results[row] = error

    def parcel(self, *, attempt: int, engine_deaths: int) -> Parcel:
        """The shard with its generations; every answerable row must have been run or failed. Blocks for the table."""
        ended = time.monotonic()
        answers = [result for result in self._results if isinstance(result, Answer)]
        first = self._first_admitted or ended
        info = self._started.info
        return Parcel(
            shard=self._parcel.shard,
            rows=self._parcel.rows,
            prompts=self._prompts,
            generations=_generation_table(self._prompts, self._results),
            notes=self._parcel.notes,
        ).noting(
            attempt=attempt,
            engine_deaths=engine_deaths,
            queue_s=max(0.0, first - self._began),
            generate_s=ended - first,
            latency_s=Histogram.of(self._latencies).to_dict(),
            ttft_s=Histogram.of(a.ttft_s for a in answers if a.ttft_s is not None).to_dict(),
            preemptions=sum(a.preemptions for a in answers),
            replica=f"{socket.gethostname()}:{os.getpid()}",
            engine=info.name,
            device=info.device,
            engine_start_s=info.start_s,
            engine_ready_at=info.ready_at,
            **{f"engine_{name}": seconds for name, seconds in asdict(info.start_parts).items()},
        )

    async def _row(self, row: int) -> None:
        began = time.monotonic()
        try:
            self._results[row] = await self._answer(
                self._token_ids[row].values.to_pylist(), self.row_ids[row]
            )
            self._latencies.append(time.monotonic() - began)
        except RowError as error:
            self._results[row] = error

    async def _answer(self, token_ids: Sequence[int], row_id: str) -> Answer:
        seed = None if self._work.sampling.seed is None else row_seed(self._work.sampling.seed, row_id)
        request_id = f"{self._work.run_id}-{next(self._numbers)}"
        limit, began = self._work.errors.request_timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(limit):
                return await self._started.engine.generate(request_id, token_ids, seed)
        except TimeoutError:
            if self._started.engine.last_token_at < began:
                raise EngineDied(f"no token from any request for {limit:g} s") from None
            raise RowError("request_timeout", f"no answer within {limit:g} s") from None


def row_seed(seed: int, row_id: str) -> int:
    """The sampling seed of one row: 63 bits, from the job's seed and the row's identity only."""
    digest = hashlib.blake2b(f"{seed}\0{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _generation_table(prompts: pa.Table, results: Sequence[Answer | RowError | None]) -> pa.Table:
    """`GENERATION_SCHEMA`: one row per sample, or one row with the error of a prompt that got none."""
    columns: dict[str, list[Any]] = {name: [] for name in GENERATION_SCHEMA.names}

    def add(**values: Any) -> None:
        for name, column in columns.items():
            column.append(values.get(name))

    codes, messages = prompts["error_code"].to_pylist(), prompts["error_message"].to_pylist()
    for row, result in enumerate(results):
        if isinstance(result, Answer):
            for index, sample in enumerate(result.samples):
                add(
                    row=row,
                    sample_index=index,
                    token_ids=sample.token_ids,
                    text=sample.text,
                    finish_reason=sample.finish_reason,
                    cached_tokens=result.cached_tokens,
                    logprobs=sample.logprobs,
                )
        elif isinstance(result, RowError):
            add(row=row, sample_index=0, error_code=result.code, error_message=str(result))
        else:
            add(row=row, sample_index=0, error_code=codes[row], error_message=messages[row])
    return pa.table(columns, schema=GENERATION_SCHEMA)
