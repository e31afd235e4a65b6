"""Shards that wait for each other's answers: beside each other in one engine, over engines, and when engines or the shelf die."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.exceptions

from pipelines import generate, shared_answers
from pipelines.answer_keys import answer_keys
from pipelines.contracts import Retry, Work
from pipelines.generate import Generate
from pipelines.shared_answers import ShelfActor, ShelfHere, ShelfThere, Shelves
from pipelines.shelf import Shelf
from pipelines.stage import Parcel
from pipelines.stop import StopFlag
from pipelines.tokenizer import load_tokenizer
from tests.local.runs import job
from tests.unit.stages import planned
from tests.unit.test_generate import Actor, Flag, attempts_of, deaths_of, errors_of, like_ray, parcel, suspect

pytestmark = pytest.mark.slow

POISON = 7
#: Longer than this process stands still once its engines have started.
STALE_S = 1.5
#: Prompts that two shards have in common.
COMMON: list[list[int] | None] = [[10, 10 + row] for row in range(20)]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is not the actor's own; a second is long."""
    monkeypatch.setattr(generate, "do_without_torch", lambda model: None)
    monkeypatch.setattr(shared_answers, "TELL_S", 0.02)
    monkeypatch.setattr(ShelfThere, "pauses", (0.01, 0.1))


MakeWork = Callable[..., Work]


@pytest.fixture
def make_work(tmp_path: Path) -> MakeWork:
    def make(errors: dict[str, Any] | None = None, **simulated: Any) -> Work:
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"question": ["a"]}), tmp_path / "in" / "x.parquet")
        model = {"simulated": {"tokens_per_s": 1e6, **simulated}}
        settings = job(tmp_path / "in", tmp_path / "out", model=model, errors=errors or {})
        work = planned(settings).work("run-1")
        load_tokenizer(work.model)  # transformers is not imported by two engines' threads at once
        return work

    return make


class Sharing(Actor):
    """An actor whose shelf is this one."""

    def __init__(self, work: Work, shelf: Shelves, stop: StopFlag | None = None) -> None:
        self.gone = asyncio.Event()
        Generate.__init__(self, work, stop, shelf=shelf)


class Handle:
    """Ray's handle of a `ShelfActor`, of an engine whose process may die."""

    def __init__(self, actor: ShelfActor) -> None:
        self.process_is_dead = False
        self.fails: BaseException | None = None
        self.calls: list[str] = []
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            async def remote(*given: Any) -> Any:
                self.calls.append(name)
                if self.process_is_dead:
                    await asyncio.Event().wait()
                if self.fails is not None:
                    raise self.fails
                return getattr(self._actor, name)(*given)

        return Method


@pytest.fixture
def shelf_actor(monkeypatch: pytest.MonkeyPatch) -> ShelfActor:
    monkeypatch.setattr(shared_answers, "end_with_parent", lambda: None)
    return ShelfActor(Shelf(stale_s=STALE_S))


def asked(one: Parcel) -> int:
    return sum(one.notes["latency_s"]["counts"].values())


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.005)


async def done(call: asyncio.Task[pa.Table]) -> Parcel:
    return Parcel.from_batch(await asyncio.wait_for(call, 30))


def began(actor: Actor, number: int, prompts: list[list[int] | None]) -> asyncio.Task[pa.Table]:
    return asyncio.create_task(actor(parcel(number, prompts).to_batch()))


def is_asked(actor: Actor, number: int) -> bool:
    """Whether the engine has the shard."""
    return key_of(number) in actor._in_hand and key_of(number) not in actor._idle


def key_of(number: int) -> str:
    return f"{number:016x}"


async def test_a_shard_waits_for_what_another_one_is_at(make_work: MakeWork) -> None:
    actor = Actor(make_work(tokens_per_s=400, min_tokens=20, max_tokens=20))
    first = began(actor, 0, COMMON)
    await until(lambda: is_asked(actor, 0))
    second = began(actor, 1, [*COMMON[5:], None])
    await until(lambda: key_of(1) in actor._idle)
    assert not first.done()
    one, two = await done(first), await done(second)
    assert (one.notes["rows_reused"], two.notes["rows_reused"]) == (0, 15)
    assert errors_of(one) == {}
    assert errors_of(two) == {15: "missing_value"}
    assert one.generations is not None
    assert two.generations is not None
    assert two.generations["token_ids"].to_pylist()[:15] == one.generations["token_ids"].to_pylist()[5:]
    assert actor._idle == set()
    await actor.bury()


async def test_a_shard_that_waits_is_spared_when_the_engine_dies(make_work: MakeWork) -> None:
    work = make_work({"max_attempts": 1, "engine_stall_s": 1.0}, stalls_of=POISON)
    shards = [parcel(0, [[POISON], *COMMON]), parcel(1, COMMON)]
    actor = Actor(work)
    calls = [asyncio.create_task(actor(shards[0].to_batch()))]
    await until(lambda: is_asked(actor, 0))
    calls.append(asyncio.create_task(actor(shards[1].to_batch())))
    await until(lambda: key_of(1) in actor._idle)
    await asyncio.wait_for(actor.gone.wait(), 30)
    await actor.bury()
    await asyncio.gather(*calls, return_exceptions=True)
    assert [attempts_of(work, n) for n in range(2)] == [[None], []]
    found, actors = await like_ray(work, shards)
    assert [errors_of(found[key_of(n)]) for n in range(2)] == [{0: "engine_crash"}, {}]
    assert deaths_of(work, 1) == ()
    assert found[key_of(1)].notes["engine_deaths"] == 0
    assert actors == 3


async def test_another_engine_asks_for_what_a_dead_one_was_at(
    make_work: MakeWork, shelf_actor: ShelfActor
) -> None:
    work = make_work(stalls_of=POISON)
    handles = [Handle(shelf_actor), Handle(shelf_actor)]
    doomed, other = (Sharing(work, ShelfThere(handle)) for handle in handles)
    await asyncio.gather(doomed._started(), other._started())
    first = began(doomed, 0, [[POISON], *COMMON])
    await until(lambda: is_asked(doomed, 0))
    second = began(other, 1, COMMON)
    await until(lambda: len(handles[1].calls) > 40)
    await asyncio.sleep(STALE_S + 0.5)
    assert not second.done()  # the one that is at it still says that it is alive
    handles[0].process_is_dead = True
    two = await done(second)
    assert errors_of(two) == {}
    assert (asked(two), two.notes["rows_reused"]) == (20, 0)
    first.cancel()
    await asyncio.gather(doomed.bury(), other.bury())


async def test_engines_share_through_the_actor(make_work: MakeWork) -> None:
    # However long this process stands still: nobody has died here.
    shelf_actor = ShelfActor(Shelf(stale_s=60))
    work = make_work(tokens_per_s=2000, min_tokens=20, max_tokens=20)
    handles = [Handle(shelf_actor), Handle(shelf_actor)]
    actors = [Sharing(work, ShelfThere(handle)) for handle in handles]
    calls = [began(actors[n % 2], n, [*COMMON[n:], [12, n]]) for n in range(6)]
    ended = [await done(call) for call in calls]
    assert [errors_of(one) for one in ended] == [{}] * 6
    assert sum(asked(one) for one in ended) == 26
    assert all(len(handle.calls) < 200 for handle in handles)
    for actor in actors:
        assert actor._in_hand == {}
        await actor.bury()
    assert shelf_actor._shelf._owner_of == {}


async def test_a_suspect_waits_for_nobody(make_work: MakeWork, shelf_actor: ShelfActor) -> None:
    """It has its engine alone."""
    work = make_work(stalls_of=POISON)
    suspect(work, 1)
    stalled, other = (Sharing(work, ShelfThere(Handle(shelf_actor))) for _ in range(2))
    await asyncio.gather(stalled._started(), other._started())
    first = began(stalled, 0, [[POISON], *COMMON])
    await until(lambda: is_asked(stalled, 0))
    two = await done(began(other, 1, COMMON))
    assert errors_of(two) == {}
    assert (asked(two), two.notes["rows_reused"]) == (20, 0)
    assert not first.done()
    first.cancel()
    await asyncio.gather(stalled.bury(), other.bury())


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_without_a_shelf_all_is_asked(
    make_work: MakeWork,
    shelf_actor: ShelfActor,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shared_answers, "ANSWER_S", 0.2)
    work = make_work(stalls_of=POISON)
    handles = [Handle(shelf_actor), Handle(shelf_actor)]
    stalled, other = (Sharing(work, ShelfThere(handle)) for handle in handles)
    await asyncio.gather(stalled._started(), other._started())
    first = began(stalled, 0, [[POISON], *COMMON])
    await until(lambda: is_asked(stalled, 0))
    second, third = began(other, 1, COMMON), began(other, 2, COMMON)
    await until(lambda: len(handles[1].calls) > 10)
    with caplog.at_level(logging.WARNING, "pipelines.shared_answers"):
        if how == "dies":
            handles[1].fails = ray.exceptions.RayActorError()
        else:
            handles[1].process_is_dead = True
        async with asyncio.timeout(10):
            ended = [await done(second), await done(third)]
    assert [errors_of(one) for one in ended] == [{}, {}]
    assert [asked(one) for one in ended] == [20, 20]
    assert len([r for r in caplog.records if "shared no more" in r.message]) == 1
    fourth = await done(began(other, 3, COMMON))
    assert asked(fourth) == 20
    first.cancel()
    await asyncio.gather(stalled.bury(), other.bury())


async def test_a_suspect_in_groups_waits_for_nobody(make_work: MakeWork) -> None:
    work, shelf = make_work({"max_attempts": 1}), Shelf()
    suspect(work, 0)
    actor = Sharing(work, ShelfHere(shelf))
    claim_elsewhere(actor, shelf, COMMON)
    one = await done(began(actor, 0, COMMON))
    assert errors_of(one) == {}
    assert asked(one) == 20
    await actor.bury()


def claim_elsewhere(actor: Actor, shelf: Shelf, prompts: list[list[int] | None]) -> None:
    """Another owner is at these, and stays there."""
    keys = answer_keys(parcel(9, prompts).prompts, actor.work)
    prefix = actor._asking[0]._shared._prefix  # type: ignore[union-attr]
    shelf.claim("elsewhere", [prefix + key for key in keys.values()])


async def test_a_stop_gives_a_waiting_shard_its_grace_and_then_ends_it(make_work: MakeWork) -> None:
    flag, shelf = Flag(), Shelf()
    actor = Sharing(make_work(), ShelfHere(shelf), flag)
    claim_elsewhere(actor, shelf, COMMON[3:])
    waiting = began(actor, 0, COMMON)
    await until(lambda: len(shelf._answers) == 3 and key_of(0) in actor._idle)
    flag.set(0.3)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    failure = (await done(waiting)).failure
    assert failure is not None
    assert failure.kind == "Stopped"
    assert shelf._claims.keys() == {"elsewhere"}
    assert actor._in_hand == {}
    assert actor._idle == set()
    await actor.bury()


async def test_retries_share(make_work: MakeWork) -> None:
    work = replace(make_work(), retry=Retry(error_codes=None, fingerprint="f"))
    actor = Actor(work)
    assert [asked(await done(began(actor, n, COMMON))) for n in range(2)] == [20, 0]
    await actor.bury()


async def test_an_engine_whose_process_stood_still_keeps_its_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor's word has come by then: its silence is this process's own."""
    monkeypatch.setattr(shared_answers, "START_S", 0.2)

    class Answering:
        def remote(self, *_: Any) -> asyncio.Future[Any]:
            reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.05, reply.set_result, ({0: b"answer"}, []))
            return reply

    shelf = ShelfThere(SimpleNamespace(claim=Answering(), hear=Answering()))
    claim = asyncio.ensure_future(shelf.claim("owner", [b"key"]))
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - the whole process
    assert await claim == ({0: b"answer"}, [])
    shelf.release("owner")
