"""The commit and lock protocol under seeded schedules; and that the schedules find what would break it.

A seed that fails is replayed by `World(seed, kind).run()`: the error carries the trace of its effects.
"""

from __future__ import annotations

import inspect
import logging
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import pytest

import jobs.lock
import jobs.runner
import pipelines.commit
from tests.proof import world
from tests.proof.scale import SEEDS
from tests.proof.store import Kind
from tests.proof.world import World

KINDS: tuple[Kind, ...] = get_args(Kind)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_breaks_a_promise(kind: Kind) -> None:
    for seed in range(SEEDS):
        World(seed, kind).run()


def test_a_schedule_is_determined_by_its_seed() -> None:
    first, second = World(3, "s3"), World(3, "s3")
    for one in (first, second):
        one.run()
    assert first.schedule.trace == second.schedule.trace


class Mutation(NamedTuple):
    """One line of the product, made wrong, and a schedule that shows it."""

    owner: Any
    function: str
    right: str
    wrong: str
    kind: Kind
    seed: int


MUTATIONS = {
    "a lock that is not created exclusively": Mutation(
        jobs.lock.OutputLock,
        "acquire",
        "not self._storage.create(LOCK_NAME, self._mine.to_json())",
        "self._storage.write(LOCK_NAME, self._mine.to_json())",
        "s3",
        0,
    ),
    "a takeover after one look": Mutation(
        jobs.lock.OutputLock,
        "_stands_still",
        "max(self._stale_s, 3 * holder.heartbeat_s if holder else 0.0)",
        "3.0",
        "s3",
        0,
    ),
    "a holder that counts as dead": Mutation(
        jobs.lock.Holder,
        "is_dead",
        "return _process_started(self.pid) not in (self.pid_started, _HIDDEN)",
        "return True",
        "s3",
        3,
    ),
    "a beat that overlooks the taker": Mutation(
        jobs.lock.OutputLock, "_recognise", "self.lost.set()", "pass", "s3", 216
    ),
    "a beat that forgets a cancel": Mutation(
        jobs.lock.OutputLock,
        "_beat",
        "self.cancelled_by = holder.cancelled_by",
        "pass",
        "s3",
        112,
    ),
    "a release of whatever lock is there": Mutation(
        jobs.lock.OutputLock,
        "release",
        "holder is not None and holder.token == self._mine.token",
        "True",
        "s3",
        29,
    ),
    "a commit that is not create-only": Mutation(
        pipelines.commit.Commit,
        "shard",
        'if self.storage.create(f"data/{parcel.shard.part_name}", data)',
        'if not self.storage.write(f"data/{parcel.shard.part_name}", data)',
        "s3",
        0,
    ),
    "a merge without compare-and-swap": Mutation(
        World,
        "merge",
        "if storage.replace(info.name, merged, found[1])",
        "if not storage.write(info.name, merged)",
        "s3",
        3,
    ),
    "an outcome that is counted twice": Mutation(
        jobs.runner.Driver, "_count", "if shard.id in self.done", "if False", "s3", 2
    ),
}


def mutate(patch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    """The function with that one change, in its own module."""
    function = inspect.unwrap(getattr(mutation.owner, mutation.function))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.right) == 1, f"{mutation.function} has changed: mend the mutation"
    local: dict[str, Any] = {}
    exec(source.replace(mutation.right, mutation.wrong), function.__globals__, local)
    patch.setattr(mutation.owner, mutation.function, local[mutation.function])


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_simulation_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    mutate(monkeypatch, mutation)

    def ten_schedules() -> None:  # not only one: a change elsewhere may shift it
        for seed in range(mutation.seed, mutation.seed + 10):
            World(seed, mutation.kind).run()

    with pytest.raises(world.BROKEN):
        ten_schedules()
