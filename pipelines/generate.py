"""Answer a shard's prompts: one engine, several shards in flight, each request on its own."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.admission import Gate, admission_policy
from pipelines.code import check_code
from pipelines.contracts import GENERATION_SCHEMA, Work
from pipelines.engine import Answer, Engine, EngineInfo, open_engine
from pipelines.errors import EngineDied, EngineStartError, RowError
from pipelines.histogram import Histogram
from pipelines.stage import Failure, Parcel
from pipelines.tokenizer import do_without_torch


@dataclass(frozen=True)
class Started:
    """An engine that is ready, and the gate before it."""

    engine: Engine
    info: EngineInfo
    gate: Gate


class Generate:
    """The engine actor of the Ray graph: shards in, shards with generations out.

    Ray Data calls it for several shards at once, all on one event loop. The engine starts with the actor, beside the
    first shard's reading; whoever comes first waits for it, and gets the error if it does not start.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        if work.model.backend == "simulated":
            do_without_torch(work.model)
        self._starter = ThreadPoolExecutor(1)
        self._start = self._starter.submit(self._open)
        self._arrivals = itertools.count()
        self._requests = itertools.count()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        parcel = Parcel.from_batch(batch)
        if parcel.failure:
            return parcel.to_batch()
        start = self._start
        try:
            started = await asyncio.wrap_future(start)
            answered = await Answering(self.work, started, self._requests).shard(
                parcel, priority=next(self._arrivals)
            )
            return await asyncio.to_thread(answered.to_batch)
        except Exception as error:  # noqa: BLE001 - classified by Failure.of
            if isinstance(error, EngineDied) and start is self._start:
                # The next shard gets a new engine; shards of the dead one fail and come back.
                self._start = self._starter.submit(self._reopen, start.result().engine)
            elif isinstance(error, EngineStartError) and start is self._start:
                self._start = self._starter.submit(self._open)
            return parcel.failed(Failure.of("generate", error)).to_batch()

    def _open(self) -> Started:
        """Blocks until the engine is ready. An engine takes the loop of its first request, not this one."""
        check_code(self.work.code_digest, self.work.code_path)
        engine = open_engine(self.work.model, self.work.sampling, self.work.pool)
        info = asyncio.run(engine.start())
        return Started(engine, info, Gate(admission_policy(self.work.pool.admission, info.max_num_seqs)))

    def _reopen(self, dead: Engine) -> Started:
        asyncio.run(dead.stop())
        return self._open()


class Answering:
    """One shard's requests on a started engine."""

    def __init__(self, work: Work, started: Started, requests: itertools.count[int]) -> None:
        self.work, self.requests = work, requests
        self.engine, self.info, self.gate = started.engine, started.info, started.gate

    async def shard(self, parcel: Parcel, priority: int) -> Parcel:
        """Answer every prompt that has tokens. Raises what is not one row's fault, after aborting the rest."""
        assert parcel.prompts is not None
        prompts = parcel.prompts
        results: list[Answer | RowError | None] = [None] * len(prompts)
        latencies: list[float] = []
        first_admitted: float | None = None
        row_ids, token_ids = prompts["row_id"], prompts["token_ids"].combine_chunks()

        async def answer(row: int) -> None:
            began = time.monotonic()
            try:
                results[row] = await self._answer(token_ids[row].values.to_pylist(), row_ids[row].as_py())
                latencies.append(time.monotonic() - began)
            except RowError as error:
                results[row] = error

        began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for row, answerable in enumerate(token_ids.is_valid().to_pylist()):
                    if answerable:
                        await self.gate.enter(priority)
                        first_admitted = first_admitted or time.monotonic()
                        # A callback, not a `finally`: a task that is cancelled before its first step never runs one.
                        group.create_task(answer(row)).add_done_callback(lambda _: self.gate.leave())
        except* Exception as errors:  # noqa: BLE001 - re-raised as one
            # One cause is enough to fail the shard; an engine's death explains all the others.
            causes = list(_leaves(errors))
            raise next((e for e in causes if isinstance(e, EngineDied)), causes[0]) from None
        ended = time.monotonic()
        answers = [result for result in results if isinstance(result, Answer)]
        generations = await asyncio.to_thread(_generation_table, prompts, results)
        first = first_admitted or ended
        return Parcel(
            shard=parcel.shard, rows=parcel.rows, prompts=prompts, generations=generations, notes=parcel.notes
        ).noting(
            queue_s=max(0.0, first - began),
            generate_s=ended - first,
            latency_s=Histogram.of(latencies).to_dict(),
            ttft_s=Histogram.of(a.ttft_s for a in answers if a.ttft_s is not None).to_dict(),
            preemptions=sum(a.preemptions for a in answers),
            replica=f"{socket.gethostname()}:{os.getpid()}",
            engine=self.info.name,
            device=self.info.device,
            engine_start_s=self.info.start_s,
            engine_ready_at=self.info.ready_at,
        )

    async def _answer(self, token_ids: Sequence[int], row_id: str) -> Answer:
        seed = None if self.work.sampling.seed is None else row_seed(self.work.sampling.seed, row_id)
        request_id = f"{self.work.run_id}-{next(self.requests)}"
        limit = self.work.errors.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self.engine.generate(request_id, token_ids, seed)
        except TimeoutError:
            raise RowError("request_timeout", f"no answer within {limit:g} s") from None


def row_seed(seed: int, row_id: str) -> int:
    """The sampling seed of one row: 63 bits, from the job's seed and the row's identity only."""
    digest = hashlib.blake2b(f"{seed}\0{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _leaves(group: BaseExceptionGroup[Any]) -> Any:
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
