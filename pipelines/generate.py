"""The engine's actor: shards in, shards with generations out; one engine, several shards in flight.

A shard stays while the generations that follow are this engine's too (`pipelines.generations`).

    a shard's first attempt                       beside the other shards
    after a death of the engine under it          alone
    after `errors.max_attempts` deaths            alone, in groups of 32 rows, then one by one: see `pipelines.attempts`

An engine that dies, or hangs, takes its process with it: children are killed, the device's memory is free, and Ray
starts a new one which gets the same shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import NoReturn

import pyarrow as pa
import ray
import ray.exceptions

from pipelines.answering import Started, replica_name
from pipelines.asking import Asking
from pipelines.attempts import Attempt, Attempts, History, clear_attempts
from pipelines.code import check_code
from pipelines.contracts import Work
from pipelines.errors import EngineDied, EngineStartError, RowError, Stopped
from pipelines.generations import engine_of, pools_of
from pipelines.merge import is_committed
from pipelines.metrics import INTERVAL_S, EngineMetrics
from pipelines.orphans import end_with_parent, end_with_this_process
from pipelines.policy import check_model_allowed
from pipelines.shared_answers import ShelfHere, Shelves
from pipelines.stage import Failure, Parcel
from pipelines.stop import StopFlag
from pipelines.storage import Storage
from pipelines.tokenizer import do_without_torch
from pipelines.turns import Turns

_log = logging.getLogger(__name__)

#: Tries of a replaced actor to start its engine, and seconds between them: a device's memory may not be free yet.
RESTARTS = 3
RESTART_PAUSE_S = 10.0
#: The exit status of an actor whose engine died; Ray's logs show it.
ENGINE_DIED_STATUS = 75


class Generate:
    """One actor of the pool.

    Ray Data calls it for several shards at once, all on one event loop. The engine starts with the actor, beside the
    first shard's reading; whoever comes first waits for it, and gets the error if it does not start. Of a job that may
    find all its answers kept (`Work.may_ask_nothing`) it starts with the first shard that has a row to ask.
    """

    def __init__(
        self,
        work: Work,
        stop: StopFlag | None = None,
        pool: int = 0,
        shelf: Shelves | None = None,
        *,
        own_process: bool = False,
    ) -> None:
        """`pool`: which of `pools_of(work)`. `shelf`: of a pool of several engines.
        `own_process`: nothing else runs in this process, and what it starts may be killed with it."""
        self._generations = pools_of(work)[pool]
        numbers, shelf = itertools.count(), shelf or ShelfHere()
        pairs = itertools.pairwise((None, *self._generations))
        self._asking = [Asking(work, one, before, shelf, numbers) for before, one in pairs if one]
        self.work = work = self._generations[0].work
        if own_process:
            end_with_parent()
        if work.model.backend == "simulated":
            if not any(generation.parses for generation in self._generations):
                do_without_torch(work.model)
        elif own_process:
            end_with_this_process()
        self.storage = Storage(work.output.path, work.output.storage_options)
        self.attempts = Attempts(self.storage, f"generate-{pool}" if pool else "generate", work.run_id)
        self._stop = stop
        self._stopping = False
        self._turns = Turns()
        self._arrivals = itertools.count()
        self._calls: dict[asyncio.Future[Parcel], str] = {}
        """Shards that are here: their work, and the key of their attempts."""
        self._in_hand: dict[str, Attempt] = {}
        """Shards that are being answered: the key of their attempts, and the latest record."""
        self._idle: set[str] = set()
        """Those of them of which the engine has nothing."""
        self._metrics = EngineMetrics(work.job, replica_name())
        self._end: asyncio.Task[None] | None = None
        """Under way once the engine is dead."""
        self._watchers: tuple[asyncio.Task[None], ...] = ()
        self._starter = ThreadPoolExecutor(1)
        self._start: Future[Started] | None = None
        # A process before this one had an engine, or died while it started: a row asks for it, and may not be taken for the culprit.
        if not work.may_ask_nothing or _replaced_actor() is not None:
            self._start = self._starter.submit(self._open)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        parcel = Parcel.from_batch(batch)
        if parcel.failure or parcel.notes.get("committed"):
            return parcel.to_batch()
        self._watch()
        call = asyncio.ensure_future(self._shard(parcel))
        self._calls[call] = self.work.attempts_key(parcel.shard)
        try:
            if self._stopping:
                call.cancel()
            return await asyncio.to_thread((await call).to_batch)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            failure = Failure.of("generate", Stopped("the run was stopped before this shard was done"))
        except Exception as error:  # noqa: BLE001 - classified by Failure.of
            await self._unless_ending()
            failure = Failure.of("generate", error)
        finally:
            self._calls.pop(call, None)
        return parcel.failed(failure).to_batch()

    # ── one shard ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _shard(self, parcel: Parcel) -> Parcel:
        """Every row answered or failed, however often it takes a new engine. Raises what is not one row's fault."""
        if self._start is None:
            await asyncio.to_thread(self._check)
        else:
            await self._started()
        arrival = next(self._arrivals)
        shard, pass_ = self.work.attempts_key(parcel.shard), parcel.notes["pass"]
        async with self._turns.shared():
            await self._unless_ending()
            first = await asyncio.to_thread(self.attempts.begin, shard, pass_)
            if first is not None:
                return await self._whole(parcel, arrival, first, deaths=0)
        history = await asyncio.to_thread(self.attempts.history, shard, pass_)
        most = self.work.errors.max_attempts
        history.check("generate", parcel.shard.part_name, most=2 * most)
        if await asyncio.to_thread(is_committed, self.storage, parcel.shard, self.work):
            # Ray repeats finished work when it loses the result.
            return Parcel(shard=parcel.shard, notes=parcel.notes).noting(committed=True)
        deaths = len(history.deaths)
        async with self._turns.alone() if deaths else self._turns.shared():
            await self._unless_ending()
            if deaths >= most:
                return await self._in_groups(parcel, arrival, history)
            attempt = await asyncio.to_thread(self.attempts.another, shard, pass_, history.latest)
            return await self._whole(parcel, arrival, attempt, deaths)

    async def _whole(self, parcel: Parcel, arrival: int, attempt: Attempt, deaths: int) -> Parcel:
        shard = self.work.attempts_key(parcel.shard)
        alone = deaths > 0
        deaths += parcel.notes.get("engine_deaths", 0)  # of the pools before
        for asking in self._asking:
            answering = await asking.of(parcel, self._started, arrival)
            async with self._holding(shard, attempt):
                if alone:  # other engines' answers are not waited for, while this one has nothing else to do
                    await answering.run(answering.answerable)
                else:
                    await asking.run(shard, answering, partial(self._idling, shard))
            parcel = await asyncio.to_thread(asking.answered, answering, attempt.number, deaths)
        return parcel

    async def _in_groups(self, parcel: Parcel, arrival: int, history: History) -> Parcel:
        """A suspect's rows, few at a time and written down before, so that a death tells whose it was."""
        shard, number = self.work.attempts_key(parcel.shard), history.latest
        deaths = len(history.deaths) + parcel.notes.get("engine_deaths", 0)
        for asking in self._asking:
            answering = await asking.of(parcel, self._started, arrival)
            ids = answering.row_ids
            for row in answering.answerable:
                if ids[row] in history.condemned:
                    answering.fail(row, RowError("engine_crash", history.reason(ids[row])))
            answerable = [ids[row] for row in answering.answerable]
            for places in history.groups(answerable):
                rows = [answering.answerable[place] for place in places]
                attempt = await asyncio.to_thread(
                    self.attempts.another, shard, history.pass_, number, [ids[row] for row in rows]
                )
                number = attempt.number
                async with self._holding(shard, attempt):
                    await answering.run(rows)
            parcel = await asyncio.to_thread(asking.answered, answering, number, deaths)
        return parcel

    @asynccontextmanager
    async def _holding(self, shard: str, attempt: Attempt) -> AsyncIterator[None]:
        """While the shard is being answered. Where the engine dies it stays in hand: `_die` tells of it."""
        self._in_hand[shard] = attempt
        try:
            yield
        except EngineDied as error:
            # Before the turn passes to the next shard, which would die of nothing.
            self._begin_end(str(error))
            raise
        except BaseException:
            del self._in_hand[shard]
            raise
        del self._in_hand[shard]

    @contextmanager
    def _idling(self, shard: str) -> Iterator[None]:
        """While the engine has nothing of a shard in hand: what it dies of then is not of this one."""
        self._idle.add(shard)
        try:
            yield
        finally:
            self._idle.discard(shard)

    # ── the engine's life ───────────────────────────────────────────────────────────────────────────────────────

    async def _started(self) -> Started:
        """The engine, once it is ready; it starts now if it has not begun to. Where it does not start, the next shard finds a new
        try."""
        start = self._start = self._start or self._starter.submit(self._open)
        try:
            return await asyncio.shield(asyncio.wrap_future(start))
        except Exception:
            if start is self._start:
                self._start = self._starter.submit(self._open)
            raise

    @property
    def _ready(self) -> Started | None:
        """The engine, if it is ready."""
        start = self._start
        return start.result() if start is not None and start.done() and not start.exception() else None

    def _check(self) -> None:
        """What has to hold of this process before it touches a shard."""
        check_code(self.work.code_digest, self.work.code_path)
        check_model_allowed(self.work.model)  # by this machine's own policy

    def _open(self) -> Started:
        """Blocks until the engine is ready. An engine takes the loop of its first request, not this one."""
        self._check()
        actor = _replaced_actor()
        if actor is None:
            return self._open_once()
        # Lest a process that dies while its engine starts be replaced for ever.
        starts = Attempts(self.storage, "start", self.work.run_id)
        history = starts.history(actor, 0)
        history.check("start", f"actor {actor}", most=2 * RESTARTS)
        starts.another(actor, 0, history.latest)
        for again in reversed(range(RESTARTS)):
            try:
                started = self._open_once()
                clear_attempts(self.storage, actor)
                self._metrics.restarted()
                return started
            except EngineStartError as error:
                if not again:
                    raise
                _log.warning("the engine of a replaced actor does not start, trying again: %s", error)
                time.sleep(RESTART_PAUSE_S)
        raise AssertionError("unreachable")

    def _open_once(self) -> Started:
        engine = engine_of(self._generations)
        info = asyncio.run(engine.start())
        return Started.of(engine, info, self.work)

    def _begin_end(self, reason: str) -> None:
        """The engine is dead: from now on nothing begins, and this process ends."""
        if self._end is None:
            self._end = asyncio.create_task(self._die(reason, frozenset(self._idle)))

    async def _die(self, reason: str, idle: frozenset[str]) -> None:
        """Say so in the records of all shards that the engine had, spare those it had not (`idle`), and end this process."""
        held = len(self._in_hand.keys() - idle)
        _log.error("the engine died under %d shards, which are tried again: %s", held, reason)
        try:
            for shard, attempt in list(self._in_hand.items()):
                with contextlib.suppress(Exception):  # then it counts as vanished
                    if shard in idle:
                        await asyncio.to_thread(self.attempts.withdraw, shard, attempt)
                    else:
                        await asyncio.to_thread(self.attempts.died, shard, attempt, reason)
            if (started := self._ready) is not None:
                await asyncio.to_thread(started.engine.kill)
        finally:
            self.leave()

    async def _unless_ending(self) -> None:
        """Wait for the end of a process that is ending: what it began now would count as a death of its own."""
        if self._end is not None:
            await asyncio.Event().wait()

    def leave(self) -> NoReturn:
        """End this process; Ray starts another one in its place."""
        os._exit(ENGINE_DIED_STATUS)

    # ── watchers ────────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        """Begin to watch, in the loop of the first call."""
        if not self._watchers:
            self._watchers = (
                asyncio.create_task(self._heed_stop()),
                asyncio.create_task(self._heed_stall()),
                asyncio.create_task(self._tell_metrics()),
            )

    async def _tell_metrics(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            if (started := self._ready) is not None:
                self._metrics.tell(started.engine, started.gate.in_flight)

    async def _heed_stall(self) -> None:
        """End an engine that gives no token to any of its requests for `errors.engine_stall_s`."""
        limit = self.work.errors.engine_stall_s
        tick, awake_since = min(limit / 4, 5.0), time.monotonic()
        while True:
            before = time.monotonic()
            await asyncio.sleep(tick)
            now = time.monotonic()
            if now - before > 2 * tick:  # it was this process that stood still
                awake_since = now
            if (started := self._ready) is None:
                continue
            gate = started.gate
            quiet = now - max(started.engine.last_token_at, gate.busy_since, awake_since)
            if gate.in_flight and quiet > limit:
                self._begin_end(f"no token from any of {gate.in_flight} requests for {quiet:.0f} s")

    async def _heed_stop(self) -> None:
        """Once the run is asked to stop: decline new shards, give those in hand their time, then give them up."""
        if self._stop is None:
            return
        try:
            grace_s = await self._stop.wait()
        except ray.exceptions.RayError:
            return  # the driver's node is gone, and this actor with it
        self._stopping = True
        for call, shard in list(self._calls.items()):
            if shard not in self._in_hand:
                call.cancel()
        await asyncio.sleep(grace_s)
        for call in list(self._calls):
            call.cancel()


def _replaced_actor() -> str | None:
    """The id of this actor if an earlier process of it died; None in its first life, and outside of Ray."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if not context.get_actor_id() or not context.was_current_actor_reconstructed:
        return None
    return str(context.get_actor_id())
