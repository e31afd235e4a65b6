"""Engines that answer a job's prompts without end, to be measured: each in a process of its own, as in a run, without Ray.

    Bench ── pipe ──► process: engine ◄── Gate(admission) ◄── the prompts, over and over

The processes are in sessions of their own, so that Ctrl-C reaches the sweep alone, which then ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import multiprocessing as mp
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil

from pipelines.admission import Candidate, Gate, gate_of
from pipelines.engine import Engine, EngineInfo, open_engine
from pipelines.errors import DrayError, EngineDied, EngineStartError, JobError, RowError
from pipelines.lengths import HELD, Lengths
from pipelines.row_settings import RowSettings
from pipelines.settings import AdmissionSettings, ModelSettings, PoolSettings, SamplingSettings

#: Parts of a measurement that are looked at apart, to tell how steady the speed is.
PARTS = 3
#: Windows that a measurement takes at most, where answers take longer than one.
MOST_WINDOWS = 3
#: Seconds for running engines to stop, after a setup's last measurement.
STOP_S = 5.0
#: Requests that a feed says it has.
_ENDLESS = 10**9


class Asked(NamedTuple):
    """A prompt of the job."""

    token_ids: list[int]
    max_tokens: int | None
    """The row's own, as what follows, see `row_params.Own`."""
    seed: int | None = None
    params: str | None = None


@dataclass(frozen=True)
class Rate:
    """Output tokens per second of all engines of a bench, in steady state."""

    tokens_per_s: float
    lowest: float
    """Of the window's parts."""
    highest: float
    seconds: float
    requests: int
    """Answers that ended meanwhile."""
    failed: int


class Bench:
    """Started engines. A context manager: leaving it ends every process, however far it is."""

    def __init__(
        self,
        engines: int,
        model: ModelSettings,
        sampling: SamplingSettings,
        pool: PoolSettings,
        prompts: Sequence[Asked],
        environment: dict[str, str],
    ) -> None:
        context = mp.get_context("spawn")
        self._began = time.monotonic()
        self._workers: list[tuple[Any, Any]] = []
        for number in range(engines):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, model, sampling, pool, list(prompts), number, environment)
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self.start_s = 0.0
        self.info: EngineInfo | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        family: list[psutil.Process] = []
        for process, _ in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker = psutil.Process(process.pid)
                family += [worker, *worker.children(recursive=True)]
        for _, connection in self._workers:
            connection.close()
        # Engines that run stop by themselves when the pipe closes, and leave no socket files; those that start are killed.
        left: list[psutil.Process] = psutil.wait_procs(family, timeout=STOP_S if self.info else 0)[1]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=20)
        for process, _ in self._workers:
            process.join(5)

    def wait_ready(self, deadline: float) -> EngineInfo | None:
        """The engines' figures once all have started; None when `deadline` (monotonic) comes first.

        Raises EngineStartError.
        """
        for _, connection in self._workers:
            info = _receive(connection, deadline)
            if info is None:
                return None
            self.info = info
        self.start_s = time.monotonic() - self._began
        return self.info

    def measure(self, admission: AdmissionSettings, window_s: float, deadline: float) -> Rate | None:
        """The speed with this admission, after the first requests are through; None when `deadline` comes first."""
        for _, connection in self._workers:
            connection.send((admission, window_s))
        found: list[Rate] = []
        for _, connection in self._workers:
            rate = _receive(connection, deadline)
            if rate is None:
                return None
            found.append(rate)
        for _, connection in self._workers:  # only now may the first of them rest
            connection.send(None)
        for _, connection in self._workers:
            if _receive(connection, deadline) is None:
                return None
        return Rate(
            tokens_per_s=sum(rate.tokens_per_s for rate in found),
            lowest=sum(rate.lowest for rate in found),
            highest=sum(rate.highest for rate in found),
            seconds=max(rate.seconds for rate in found),
            requests=sum(rate.requests for rate in found),
            failed=sum(rate.failed for rate in found),
        )


def _receive(connection: Any, deadline: float) -> Any:
    """What the process says next; None when `deadline` comes first. Raises what it raised."""
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        return None
    try:
        said = connection.recv()
    except EOFError:
        raise EngineStartError(
            "an engine's process ended without a word; the log has what it said last"
        ) from None
    if isinstance(said, DrayError):
        raise said
    return said


# ── In the engine's process ─────────────────────────────────────────────────────────────────────────────────────


def _serve(
    connection: Connection,
    model: ModelSettings,
    sampling: SamplingSettings,
    pool: PoolSettings,
    prompts: list[Asked],
    number: int,
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.environ.update(environment)
    asyncio.run(_answer_all(connection, open_engine(model, sampling, pool), sampling, prompts, number))


async def _answer_all(
    connection: Connection,
    engine: Engine,
    sampling: SamplingSettings,
    prompts: list[Asked],
    number: int,
) -> None:
    try:
        info = await engine.start()
        connection.send(info)
        requests, lengths = fresh_prompts(prompts, number), Lengths(sampling, info.max_model_len)
        while True:
            order = await asyncio.to_thread(_next_order, connection)
            if order is None:
                return
            admission, window_s = order
            feed = Feed(engine, gate_of(admission, engine, info), lengths, requests, sampling)
            try:
                connection.send(await feed.measure(window_s))
                await asyncio.to_thread(_next_order, connection)
            finally:
                await feed.stop()
            connection.send(True)
    except DrayError as error:
        connection.send(error)
    finally:
        await engine.stop()


def _next_order(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:  # the sweep is over
        return None


class Feed:
    """Requests without end through one gate; their line (`pipelines.admission.Line`)."""

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        lengths: Lengths,
        prompts: Iterator[Asked],
        sampling: SamplingSettings,
    ) -> None:
        self._engine, self._gate, self._lengths, self._prompts = engine, gate, lengths, prompts
        self._settings, self._dice = RowSettings(sampling), random.Random(0)
        self._next = next(prompts)
        self._numbers = itertools.count()
        self._running: set[asyncio.Task[None]] = set()
        self._ended = self._failed = 0
        self._error: DrayError | None = None
        self._filling = True
        gate.enter(0, self)
        self._filling = False

    def __len__(self) -> int:
        return _ENDLESS

    def peek(self, longest: bool) -> Candidate:
        prompt = len(self._next.token_ids)
        expected = self._lengths.predict(prompt, self._next.max_tokens)
        return Candidate(expected, prompt + math.ceil(HELD * expected))

    def start(self, kv_tokens: int) -> None:
        asked, self._next = self._next, next(self._prompts)
        cut = self._cut(asked) if self._filling else None
        task = asyncio.create_task(self._one(f"tune-{id(self)}-{next(self._numbers)}", asked, cut))
        self._running.add(task)
        task.add_done_callback(partial(self._done, kv_tokens))

    def fail(self, error: Exception) -> None:
        self._error = self._error or JobError(f"admission failed: {error!r}")

    def _cut(self, asked: Asked) -> int | None:
        """What is left of an answer that is met on its way: a random share of its limit; None where there is no limit.

        Requests that all begin at once read their prompts at once and then all write, at several times the speed that lasts.
        """
        own = self._settings.of(asked.params)
        limit = asked.max_tokens or own.max_tokens
        return limit and max(own.min_tokens, math.ceil(self._dice.random() * limit))

    async def measure(self, window_s: float) -> Rate:
        """Wait until as many answers have ended as were first admitted (`MOST_WINDOWS` at most), then look for a window, or
        until as many have ended again (as long at most): less is not what lasts where answers take longer.
        """
        warm_until = time.monotonic() + MOST_WINDOWS * window_s
        await asyncio.sleep(0.2)
        first = self._gate.in_flight
        while self._ended < first and time.monotonic() < warm_until:
            await self._pause(0.05)
        marks = [(time.monotonic(), self._engine.output_tokens)]
        ended, failed = self._ended, self._failed
        for _ in range(MOST_WINDOWS):
            for _ in range(PARTS):
                await self._pause(window_s / PARTS)
                marks.append((time.monotonic(), self._engine.output_tokens))
            if self._ended - ended >= first:
                break
        marks = marks[:: (len(marks) - 1) // PARTS]
        rates = [(n2 - n1) / (t2 - t1) for (t1, n1), (t2, n2) in itertools.pairwise(marks)]
        seconds = marks[-1][0] - marks[0][0]
        return Rate(
            tokens_per_s=(marks[-1][1] - marks[0][1]) / seconds,
            lowest=min(rates),
            highest=max(rates),
            seconds=seconds,
            requests=self._ended - ended,
            failed=self._failed - failed,
        )

    async def stop(self) -> None:
        """Give up what is in flight."""
        self._gate.withdraw(self)
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._error is not None:
            raise self._error

    def _done(self, kv_tokens: int, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._gate.leave(kv_tokens)

    async def _one(self, request_id: str, asked: Asked, cut: int | None) -> None:
        try:
            own = None if asked.params is None else self._settings.of(asked.params)
            limit = cut or asked.max_tokens
            answer = await self._engine.generate(request_id, asked.token_ids, asked.seed, limit, own)
            if cut is None:
                tokens = sum(len(sample.token_ids) for sample in answer.samples)
                self._lengths.learn(len(asked.token_ids), tokens, asked.max_tokens)
        except RowError:
            self._failed += 1
        except EngineDied as error:
            self._error = JobError(str(error))
            await asyncio.sleep(3600)  # lest the feed go round and round; `measure` ends it
        self._ended += 1


def fresh_prompts(prompts: Sequence[Asked], number: int) -> Iterator[Asked]:
    """The prompts over and over, from another one on for each engine, and never twice the same.

    A prompt that comes again would be found in the prefix cache, which the job's own are not. So its first tokens after
    what all prompts have in common change with each round; a shared system prompt stays shared, as in the job.
    """
    common = _common_prefix([prompt.token_ids for prompt in prompts])
    start = number * len(prompts) // 7 % len(prompts)
    order = [*prompts[start:], *prompts[:start]]
    tokens = sorted({token for prompt in prompts for token in prompt.token_ids[common:]})
    places = {token: place for place, token in enumerate(tokens)}
    for turn in itertools.count():
        for prompt in order:
            ids, rest = list(prompt.token_ids), turn
            for position in range(
                common, min(common + 3, len(ids))
            ):  # `turn` in digits of as many values as tokens
                ids[position] = tokens[(places[ids[position]] + rest) % len(tokens)]
                rest //= len(tokens)
            yield prompt._replace(token_ids=ids)


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return length
