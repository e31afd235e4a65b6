"""The engine's actor without Ray: engines that die, hang, are slow or do not start, poisonous rows, graceful stops."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pytest

from pipelines import generate
from pipelines.answering import Started
from pipelines.attempts import FOLDER, Attempt, Attempts
from pipelines.code import code_digest, code_path
from pipelines.contracts import PROMPT_SCHEMA, Shard, Work
from pipelines.errors import EngineStartError, TransientStorageError
from pipelines.generate import Generate
from pipelines.settings import (
    ErrorSettings,
    InputSettings,
    ModelSettings,
    OutputSettings,
    PoolSettings,
    PromptSettings,
    SamplingSettings,
)
from pipelines.simulated_engine import SimulatedEngine
from pipelines.stage import Parcel
from pipelines.stop import StopFlag
from pipelines.storage import Storage
from tests.tiny_models import byte_level

pytestmark = pytest.mark.slow


#: No prompt of a healthy row has this token.
POISON = 7
ROWS = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(byte_level(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _torch_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is not the actor's own."""
    monkeypatch.setattr(generate, "do_without_torch", lambda model: None)


MakeWork = Callable[..., Work]


@pytest.fixture
def make_work(source: str, tmp_path: Path) -> MakeWork:
    def make(errors: dict[str, Any] | None = None, run_id: str = "run-1", **simulated: Any) -> Work:
        return Work(
            job="test",
            run_id=run_id,
            fingerprint="f",
            code_digest=code_digest(),
            code_path=code_path(),
            user_modules=(),
            input=InputSettings(path="in"),
            prompt=PromptSettings(template="{{ question }}"),
            model=ModelSettings.model_validate(
                {
                    "source": source,
                    "backend": "simulated",
                    "engine": {"max_model_len": 8192},
                    "simulated": {"tokens_per_s": 1e6, **simulated},
                }
            ),
            sampling=SamplingSettings(max_tokens=None),
            output=OutputSettings(path=str(tmp_path / "out")),
            pool=PoolSettings(),
            errors=ErrorSettings.model_validate(errors or {}),
            input_schema=pa.schema([("question", pa.string())]),
        )

    return make


class Actor(Generate):
    """A Generate whose end does not end this process."""

    def __init__(self, work: Work, stop: StopFlag | None = None) -> None:
        self.gone = asyncio.Event()
        super().__init__(work, stop)

    def leave(self) -> NoReturn:
        self.gone.set()
        raise asyncio.CancelledError

    async def bury(self) -> None:
        """What the end of a process does to all that runs in it."""
        for task in (*self._watchers, *self._calls):
            task.cancel()
        await asyncio.gather(*self._watchers, *self._calls, return_exceptions=True)
        self._starter.shutdown()


def parcel(number: int, prompts: Sequence[Sequence[int] | None]) -> Parcel:
    """A prepared shard."""
    rows = [f"q{number}#{row}" for row in range(len(prompts))]
    errors = [None if prompt else "missing_value" for prompt in prompts]
    told = {"row_id": rows, "token_ids": prompts, "error_code": errors, "error_message": errors}
    table = pa.Table.from_pylist(
        [dict(zip(told, values, strict=True)) for values in zip(*told.values(), strict=True)], PROMPT_SCHEMA
    )
    shard = Shard(ordinal=number, id=f"{number:016x}", spans=(), rows=len(rows), bytes=0)
    return Parcel(shard=shard, prompts=table, notes={"pass": 0})


def healthy(number: int, rows: int = ROWS) -> list[list[int] | None]:
    """Prompts that differ from all others."""
    return [[10 + number, 10 + row] for row in range(rows)]


async def like_ray(
    work: Work, parcels: Sequence[Parcel], make: Callable[[Work], Actor] = Actor, in_flight: int = 3
) -> tuple[dict[str, Parcel], int]:
    """Calls one actor for several shards at once; when it dies, another one for those that have not come back.

    The shards that came back by id, and how many actors it took.
    """
    done: dict[str, Parcel] = {}
    for actors in itertools.count(1):
        actor = make(work)
        left = iter([p for p in parcels if p.shard.id not in done])

        async def lane(actor: Actor = actor, left: Any = left) -> None:
            for one in left:
                done[one.shard.id] = Parcel.from_batch(await actor(one.to_batch()))

        lanes = asyncio.gather(*(lane() for _ in range(in_flight)))
        dead = asyncio.create_task(actor.gone.wait())
        await asyncio.wait({lanes, dead}, return_when=asyncio.FIRST_COMPLETED)
        if lanes.done():
            await lanes
        for task in (lanes, dead):
            task.cancel()
        await asyncio.gather(lanes, dead, return_exceptions=True)
        await actor.bury()
        if len(done) == len(parcels):
            return done, actors
        assert actors < 50, "it never ends"
    raise AssertionError("unreachable")


def errors_of(one: Parcel) -> dict[int, str]:
    """Row → error code; the failed ones."""
    assert one.failure is None, one.failure
    assert one.generations is not None
    rows, codes = one.generations["row"].to_pylist(), one.generations["error_code"].to_pylist()
    assert sorted(set(rows)) == list(range(len(one.prompts or ())))
    return {row: code for row, code in zip(rows, codes, strict=True) if code}


def storage_of(work: Work) -> Storage:
    return Storage(work.output.path)


def attempts_of(work: Work, number: int) -> list[int | None]:
    """What was tried on a shard: rows of each attempt, None for all."""
    history = Attempts(storage_of(work), "generate", work.run_id).history(f"{number:016x}", 0)
    return [attempt.rows and len(attempt.rows) for attempt in history.attempts]


def deaths_of(work: Work, number: int) -> tuple[Attempt, ...]:
    """As the next run sees them."""
    return Attempts(storage_of(work), "generate", "later").history(f"{number:016x}", 0).deaths


def suspect(work: Work, number: int) -> None:
    """An engine died under this shard in an earlier run."""
    attempts = Attempts(storage_of(work), "generate", "run-0")
    first = attempts.begin(f"{number:016x}", 0)
    assert first
    attempts.died(f"{number:016x}", first, "killed")


# ── Dead engines ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("most", [1, 3])
async def test_a_poisonous_row_costs_three_engines_more_and_its_neighbours_nothing(
    make_work: MakeWork, most: int
) -> None:
    work = make_work({"max_attempts": most}, dies_of=POISON)
    prompts = [healthy(number) for number in range(6)]
    prompts[1][17] = [5, POISON, 6]
    done, actors = await like_ray(work, [parcel(n, p) for n, p in enumerate(prompts)])

    assert {n: errors_of(done[f"{n:016x}"]) for n in range(6)} == {
        n: {17: "engine_crash"} if n == 1 else {} for n in range(6)
    }
    assert actors == most + 3  # of the group, of the row alone, and the one that answers the rest
    # Beside the poison once, by chance; never again, since a suspect has the engine alone.
    assert [len(deaths_of(work, n)) <= 1 for n in range(6)] == [n != 1 for n in range(6)]
    notes = done[f"{1:016x}"].notes
    assert notes["engine_deaths"] == most + 2


@pytest.mark.parametrize("seed", range(3))
async def test_several_poisonous_rows_in_several_shards(make_work: MakeWork, seed: int) -> None:
    dice = random.Random(seed)
    work = make_work({"max_attempts": 2}, dies_of=POISON)
    bad = {(dice.randrange(4), dice.randrange(ROWS)) for _ in range(3)}
    prompts = [healthy(number) for number in range(4)]
    for number, row in bad:
        prompts[number][row] = [POISON]
    done, _ = await like_ray(work, [parcel(n, p) for n, p in enumerate(prompts)])
    found = {(n, row, code) for n in range(4) for row, code in errors_of(done[f"{n:016x}"]).items()}
    assert found == {(number, row, "engine_crash") for number, row in bad}


async def test_who_waits_for_a_turn_when_the_engine_dies_has_not_been_tried(make_work: MakeWork) -> None:
    """The dying shard's turn passes to the next one, in a process that is about to end: that is no attempt."""
    work = make_work(dies_of=POISON)
    for number in range(3):
        suspect(work, number)
    actor = Actor(work)
    calls = []
    async with actor._turns.shared(), asyncio.timeout(60):
        for number in range(3):  # they line up in this order
            prompts = [[POISON]] if number == 0 else healthy(number)
            calls.append(asyncio.create_task(actor(parcel(number, prompts).to_batch())))
            while len(actor._turns._change._waiters) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await asyncio.wait_for(actor.gone.wait(), 60)
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in calls)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await actor.bury()
    assert [attempts_of(work, n) for n in range(3)] == [[None, None], [None], [None]]


async def test_attempts_are_taken_up_by_the_next_run(make_work: MakeWork) -> None:
    """A driver that is killed between two deaths: the next one's workers know of them."""
    prompts = [[POISON], *healthy(0)]
    first = make_work({"max_attempts": 2}, dies_of=POISON)
    for _ in range(2):
        actor = Actor(first)
        call = asyncio.create_task(actor(parcel(0, prompts).to_batch()))
        await asyncio.wait_for(actor.gone.wait(), 60)
        call.cancel()
        await actor.bury()
    done, actors = await like_ray(
        make_work({"max_attempts": 2}, "run-2", dies_of=POISON), [parcel(0, prompts)]
    )
    assert errors_of(done[f"{0:016x}"]) == {0: "engine_crash"}
    assert actors == 3


async def test_an_engine_that_dies_of_everything_ends_the_job_and_not_never(make_work: MakeWork) -> None:
    work = make_work({"max_attempts": 1}, dies_of=5)
    done, actors = await like_ray(work, [parcel(0, [[5, 10 + row] for row in range(60)])])
    failure = done[f"{0:016x}"].failure
    assert failure is not None
    assert (failure.kind, failure.scope) == ("EngineBroken", "job")
    assert actors < 40


async def test_a_shard_that_stands_is_not_answered_again(make_work: MakeWork) -> None:
    work = make_work()
    one = parcel(0, healthy(0))
    Attempts(storage_of(work), "generate", work.run_id).begin(one.shard.id, 0)
    storage_of(work).create(f"data/{one.shard.part_name}", b"a part")
    done, _ = await like_ray(work, [one])
    assert done[one.shard.id].notes["committed"]
    assert done[one.shard.id].generations is None


# ── Hanging and slow engines ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_engine_that_hangs_is_replaced_and_the_row_it_hangs_of_found(make_work: MakeWork) -> None:
    work = make_work({"max_attempts": 1, "engine_stall_s": 0.4}, stalls_of=POISON)
    prompts = [healthy(number) for number in range(3)]
    prompts[1][3] = [POISON]
    done, actors = await like_ray(work, [parcel(n, p) for n, p in enumerate(prompts)])
    assert [errors_of(done[f"{n:016x}"]) for n in range(3)] == [{}, {3: "engine_crash"}, {}]
    assert actors == 4
    message = (done[f"{1:016x}"].generations or pa.table({}))["error_message"][3].as_py()
    assert "no token from any of 1 requests" in message


async def test_neither_idle_nor_slow_is_a_hang(make_work: MakeWork) -> None:
    """Tokens flow, but no answer is ready for longer than `engine_stall_s`; then there is nothing to do for as long."""
    work = make_work({"engine_stall_s": 0.3}, tokens_per_s=100, min_tokens=100, max_tokens=100)
    actor = Actor(work)
    for number in range(2):
        done = Parcel.from_batch(await actor(parcel(number, [[10]]).to_batch()))
        assert errors_of(done) == {}
        await asyncio.sleep(0.7)
    assert not actor.gone.is_set()
    await actor.bury()


async def test_a_request_that_takes_too_long_is_its_rows_error(make_work: MakeWork) -> None:
    lengths = {"min_tokens": 1, "max_tokens": 6000}
    prompts = [[10 + i // 100, 10 + i % 100] for i in range(300)]
    fast = Actor(make_work(**lengths))
    whole = Parcel.from_batch(await fast(parcel(0, prompts).to_batch()))
    await fast.bury()
    assert whole.generations is not None
    tokens = [len(ids) for ids in whole.generations["token_ids"].to_pylist()]
    # 1,000 tokens a second for all: whoever wants more than 2,000 cannot have them in two seconds.
    by_length = sorted(range(len(prompts)), key=lambda row: tokens[row])
    chosen = [*by_length[:3], *by_length[-2:]]
    assert tokens[chosen[2]] * len(chosen) < 500
    assert tokens[chosen[3]] > 2100

    actor = Actor(make_work({"request_timeout_s": 2.0}, run_id="run-2", tokens_per_s=1000, **lengths))
    done = Parcel.from_batch(await actor(parcel(1, [prompts[row] for row in chosen]).to_batch()))
    assert errors_of(done) == {3: "request_timeout", 4: "request_timeout"}
    assert not actor.gone.is_set()
    started = actor._start.result()
    assert started.gate.in_flight == 0
    assert isinstance(started.engine, SimulatedEngine)
    assert started.engine._clock is not None
    assert started.engine._clock._active == 0  # aborted in the engine, too
    await actor.bury()


async def test_a_timeout_in_a_silent_engine_is_the_engines_fault(make_work: MakeWork) -> None:
    work = make_work({"request_timeout_s": 0.5}, stalls_of=POISON)
    actor = Actor(work)
    call = asyncio.create_task(actor(parcel(0, [[POISON], [10]]).to_batch()))
    await asyncio.wait_for(actor.gone.wait(), 60)
    assert not call.done()
    call.cancel()
    await actor.bury()
    assert deaths_of(work, 0)[0].died == "no token from any request for 0.5 s"


# ── Starting ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Reluctant(Actor):
    """Its engine starts at the third try."""

    tries = 0

    def _open_once(self) -> Started:
        self.tries += 1
        if self.tries < 3:
            raise EngineStartError("the device's memory is not free")
        return super()._open_once()


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> str:
    """Ray has started this actor anew."""
    monkeypatch.setattr(generate, "_replaced_actor", lambda: "ac" * 16)
    monkeypatch.setattr(generate, "RESTART_PAUSE_S", 0.0)
    return "ac" * 16


async def test_a_first_engine_that_does_not_start_is_the_jobs_failure(make_work: MakeWork) -> None:
    actor = Reluctant(make_work())
    failed = Parcel.from_batch(await actor(parcel(0, healthy(0)).to_batch()))
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.scope) == ("EngineStartError", "job")
    assert actor.tries <= 2  # the second is the next shard's
    await actor.bury()


async def test_a_replaced_actor_tries_its_engine_again(make_work: MakeWork, replaced: str) -> None:
    work = make_work()
    actor = Reluctant(work)
    assert errors_of(Parcel.from_batch(await actor(parcel(0, healthy(0)).to_batch()))) == {}
    assert actor.tries == 3
    assert storage_of(work).list(f"{FOLDER}/{replaced}") == []
    await actor.bury()


async def test_a_process_that_dies_while_its_engine_starts_is_not_replaced_for_ever(
    make_work: MakeWork, replaced: str
) -> None:
    work = make_work()
    for number in range(2 * generate.RESTARTS):
        Attempts(storage_of(work), "start", work.run_id).another(replaced, 0, number)
    actor = Actor(work)
    failed = Parcel.from_batch(await actor(parcel(0, healthy(0)).to_batch()))
    assert failed.failure is not None
    assert failed.failure.kind == "WorkerDied"
    assert "the process of the start stage died 6 times" in failed.failure.message
    await actor.bury()


async def test_a_start_that_a_store_spoiled_is_tried_again(make_work: MakeWork) -> None:
    """Else every later shard of this actor fails of a storage fault long past."""

    class Unlucky(Actor):
        tries = 0

        def _open(self) -> Started:
            self.tries += 1
            if self.tries == 1:
                raise TransientStorageError("503 SlowDown")
            return super()._open()

    actor = Unlucky(make_work())
    one = parcel(0, healthy(0))
    failed = Parcel.from_batch(await actor(one.to_batch()))
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.scope) == ("TransientStorageError", "shard")
    assert errors_of(Parcel.from_batch(await actor(one.to_batch()))) == {}
    await actor.bury()


# ── Stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Flag(StopFlag):
    """The driver's word, without Ray."""

    def __init__(self) -> None:
        self.grace: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def set(self, grace_s: float) -> None:
        self.grace.set_result(grace_s)

    async def wait(self) -> float:
        return await self.grace


@pytest.fixture
async def stopping(make_work: MakeWork) -> AsyncIterator[tuple[Actor, Flag, list[asyncio.Task[pa.Table]]]]:
    """An actor in the middle of shard 0, which takes about a second; shard 1 waits, suspected, for a turn alone."""
    work = make_work(tokens_per_s=100, min_tokens=100, max_tokens=100)
    suspect(work, 1)
    flag = Flag()
    actor = Actor(work, flag)
    calls = [asyncio.create_task(actor(parcel(n, [[10 + n]]).to_batch())) for n in range(2)]
    async with asyncio.timeout(60):
        while f"{0:016x}" not in actor._in_hand:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)
    yield actor, flag, calls
    await actor.bury()


Stopping = tuple[Actor, Flag, list["asyncio.Task[pa.Table]"]]


def kind_of(batch: pa.Table) -> str | None:
    failure = Parcel.from_batch(batch).failure
    return failure.kind if failure else None


async def test_a_stop_lets_the_shards_in_hand_finish_and_declines_the_rest(stopping: Stopping) -> None:
    actor, flag, calls = stopping
    flag.set(60.0)
    assert kind_of(await asyncio.wait_for(calls[1], 30)) == "Stopped"
    assert not calls[0].done()
    assert kind_of(await actor(parcel(2, [[12]]).to_batch())) == "Stopped"
    assert kind_of(await asyncio.wait_for(calls[0], 30)) is None
    assert attempts_of(actor.work, 1) == [None]
    assert attempts_of(actor.work, 2) == []


async def test_what_is_not_done_within_the_grace_time_is_given_up(stopping: Stopping) -> None:
    actor, flag, calls = stopping
    flag.set(0.0)
    assert [kind_of(await asyncio.wait_for(call, 30)) for call in calls] == ["Stopped", "Stopped"]
    started = actor._start.result()
    assert started.gate.in_flight == 0
    assert actor._in_hand == {}


async def test_a_call_that_is_cancelled_by_others_is_cancelled(stopping: Stopping) -> None:
    _, _, calls = stopping
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
