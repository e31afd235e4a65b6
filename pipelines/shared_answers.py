"""One answer for equal prompts of a job, over its shards and engines: `reuse.equal_prompts` in the job file.

    a shard ──claim──► shelf     what is there is taken, what nobody is at is asked and told,
            ◄──────────          what others are at is waited for, last of all

A shard that waits claims nothing, so none waits for it: there is no circle. A job does as well without a shelf, only with more
work: one that is gone, or silent, is done without.
"""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import ray
import ray.exceptions

from pipelines.answering import Answering
from pipelines.contracts import Work
from pipelines.driver_actor import beside_driver
from pipelines.engine import Answer
from pipelines.errors import RowError
from pipelines.generations import Generation, pools_of
from pipelines.orphans import end_with_parent
from pipelines.shelf import Shelf

_log = logging.getLogger(__name__)

#: Seconds between an engine's messages to the actor; they are its shards' sign of life.
TELL_S = 1.0
#: Seconds to wait for the actor's word, and for its first one: its process may still start.
ANSWER_S, START_S = 10.0, 60.0
#: And once more, when the first wait is over.
GRACE_S = 1.0


class Shelves(Protocol):
    """A `Shelf` as one engine reaches it. `pauses`: shortest and longest seconds between two looks at what others are at."""

    pauses: tuple[float, float]

    async def claim(self, owner: str, keys: Sequence[bytes]) -> tuple[dict[int, bytes], Sequence[int]]: ...
    def tell(self, owner: str, key: bytes, answer: bytes | None) -> None: ...
    def release(self, owner: str) -> None: ...


class SharedAnswers:
    """What the shards of one generation share; one object for each engine."""

    def __init__(self, generation: Generation, shelf: Shelves) -> None:
        self._index, self._shelf = generation.index, shelf
        self._prefix = generation.index.to_bytes(2)  # generations do not share

    async def run(
        self, shard: str, answering: Answering, idle: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Have all answerable rows answered: by the engine, or by what another shard was told. Raises as `Answering.run`.

        `idle`: entered while the engine has nothing of the shard.
        """
        owner = f"{shard}/{self._index}"
        tell = partial(self._tell, owner, answering)
        shortest, longest = self._shelf.pauses
        left, pause = [row for row in answering.answerable if row not in answering.alone], 0.0
        if not left:
            await answering.run(answering.answerable)
            return
        alone = answering.alone
        try:
            while left:
                with idle():
                    await asyncio.sleep(pause)
                    keys = [self._key(answering, row) for row in left]
                    found, taken = await self._shelf.claim(owner, keys)
                for place, answer in (await asyncio.to_thread(_unpickled, found)).items():
                    answering.take(left[place], answer)
                elsewhere = {*found, *taken}
                mine = {row for place, row in enumerate(left) if place not in elsewhere}
                await answering.run(sorted(mine | alone), tell)
                alone = frozenset()
                pause = min(2 * pause, longest) if pause and len(taken) == len(left) else shortest
                left = [left[place] for place in taken]
        finally:
            self._shelf.release(owner)

    def _tell(self, owner: str, answering: Answering, row: int, result: Answer | RowError) -> None:
        if row in answering.alone:
            return
        answer = pickle.dumps(result, pickle.HIGHEST_PROTOCOL) if isinstance(result, Answer) else None
        self._shelf.tell(owner, self._key(answering, row), answer)

    def _key(self, answering: Answering, row: int) -> bytes:
        return self._prefix + answering.keys[row]


def _unpickled(found: Mapping[int, bytes]) -> dict[int, Answer]:
    return {place: pickle.loads(answer) for place, answer in found.items()}


class ShelfHere:
    """Of an engine that is its pool's only one: in its process, where no owner is lost."""

    pauses = 0.05, 0.5

    def __init__(self, shelf: Shelf | None = None) -> None:
        self._shelf = shelf or Shelf(stale_s=math.inf)

    async def claim(self, owner: str, keys: Sequence[bytes]) -> tuple[dict[int, bytes], Sequence[int]]:
        return self._shelf.claim(owner, keys)

    def tell(self, owner: str, key: bytes, answer: bytes | None) -> None:
        self._shelf.tell(owner, {key: answer})

    def release(self, owner: str) -> None:
        self._shelf.release(owner)


class ShelfThere:
    """In an actor beside the driver, for the engines of several processes, each of which has its own copy of this."""

    pauses = 0.5, 5.0

    def __init__(self, actor: Any) -> None:
        """`actor`: the handle of a `ShelfActor`."""
        self._actor = actor
        self._is_gone = False
        self._limit_s = START_S
        self._owners: set[str] = set()
        """Those that are alive, in this process."""
        self._released: set[str] = set()
        self._told: dict[str, dict[bytes, bytes | None]] = {}
        self._telling: asyncio.Task[None] | None = None

    async def claim(self, owner: str, keys: Sequence[bytes]) -> tuple[dict[int, bytes], Sequence[int]]:
        if not self._is_gone:
            self._owners.add(owner)
            self._released.discard(owner)
            if self._telling is None:
                self._telling = asyncio.create_task(self._keep_telling())
            claimed = await self._word(self._actor.claim.remote(owner, len(keys), b"".join(keys)))
            if claimed is not None:
                found, taken = claimed
                return found, taken
        return {}, ()

    def tell(self, owner: str, key: bytes, answer: bytes | None) -> None:
        if not self._is_gone:
            self._told.setdefault(owner, {})[key] = answer

    def release(self, owner: str) -> None:
        self._owners.discard(owner)
        if not self._is_gone:
            self._released.add(owner)

    async def _keep_telling(self) -> None:
        while self._owners or self._told or self._released:
            await asyncio.sleep(TELL_S)
            alive, released, told = [*self._owners], [*self._released], self._told
            self._released, self._told = set(), {}
            if not self._is_gone:
                await self._word(self._actor.hear.remote(alive, told, released))
        self._telling = None

    async def _word(self, reply: Awaitable[Any]) -> Any:
        """The actor's; None once it has none."""
        word = asyncio.ensure_future(reply)
        try:
            await asyncio.wait({word}, timeout=self._limit_s)
            await asyncio.wait({word}, timeout=GRACE_S)  # it may be this process that stood still
            if word.done():
                self._limit_s = ANSWER_S
                return word.result()
            reason = "no answer"
        except ray.exceptions.RayError as error:
            reason = str(error)
        finally:
            word.cancel()
        if not self._is_gone:
            _log.warning("equal prompts are shared no more between engines: %s", reason)
        self._is_gone = True
        return None


class ShelfActor:
    """A shelf for several processes."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        end_with_parent()
        self._shelf = shelf or Shelf()

    def claim(self, owner: str, count: int, keys: bytes) -> tuple[dict[int, bytes], list[int]]:
        """`keys`: one after the other, all of one length."""
        size = len(keys) // count
        return self._shelf.claim(owner, [keys[at : at + size] for at in range(0, len(keys), size)])

    def hear(
        self, alive: Sequence[str], told: dict[str, dict[bytes, bytes | None]], released: Sequence[str]
    ) -> bool:
        """What an engine has to say of its shards."""
        self._shelf.heard(alive)
        for owner, answers in told.items():
            self._shelf.tell(owner, answers)
        for owner in released:
            self._shelf.release(owner)
        return True


@contextmanager
def shelf_beside_driver(work: Work) -> Iterator[ShelfThere | None]:
    """For the pools of `work` that are `is_shared_by_engines`; None where there is none. Its actor ends with the context."""
    if not any(is_shared_by_engines(pool) for pool in pools_of(work)):
        yield None
        return
    actor = beside_driver(ShelfActor)
    try:
        yield ShelfThere(actor)
    finally:
        with suppress(ray.exceptions.RayError):
            ray.kill(actor)


def is_shared_by_engines(pool: Sequence[Generation]) -> bool:
    """Whether several engines are asked for what has one answer."""
    return pool[0].work.pool.most_engines > 1 and any(generation.work.asks_once for generation in pool)
