"""Whose fault a death was, from the records alone: workers die, drivers are killed, zombies write on."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.attempts import (
    BROKEN_AFTER,
    FOLDER,
    GROUP_ROWS,
    Attempt,
    Attempts,
    History,
    Stage,
    clear_attempts,
)
from pipelines.errors import EngineBroken, TransientStorageError, WorkerDied
from pipelines.storage import Storage
from pipelines.storage_backend import ObjectInfo

pytestmark = pytest.mark.slow


SHARD = "0123456789abcdef"


def in_memory() -> Storage:
    return Storage(f"memory://attempts-{uuid.uuid4().hex}")


@pytest.fixture
def storage() -> Storage:
    return in_memory()


class Worker:
    """One process of a stage: its records, and what it does with one shard of one pass."""

    def __init__(self, storage: Storage, run_id: str = "run-1", pass_: int = 0, stage: Stage = "generate"):
        self.attempts, self.pass_ = Attempts(storage, stage, run_id), pass_
        self.last: Attempt | None = None

    @property
    def history(self) -> History:
        return self.attempts.history(SHARD, self.pass_)

    def begin(self, rows: Sequence[str] | None = None) -> Attempt:
        self.last = (
            self.attempts.begin(SHARD, self.pass_) if rows is None else None
        ) or self.attempts.another(
            SHARD, self.pass_, self.last.number if self.last else self.history.latest, rows
        )
        return self.last

    def die(self, rows: Sequence[str] | None = None, reason: str = "killed") -> None:
        """Begin, and see the engine die."""
        self.attempts.died(SHARD, self.begin(rows), reason)


def test_only_the_first_of_all_attempts_begins_without_a_history(storage: Storage) -> None:
    one, two = Worker(storage), Worker(storage)
    first = one.attempts.begin(SHARD, 0)
    assert first is not None
    assert (first.number, first.rows, first.died) == (1, None, None)
    assert two.attempts.begin(SHARD, 0) is None
    assert two.history.attempts == (first,)
    assert (
        Worker(storage, stage="commit").attempts.begin(SHARD, 0) is not None
    )  # a stage's records are its own


def test_a_worker_that_was_replaced_within_a_pass_is_dead(storage: Storage) -> None:
    one, two, three = (Worker(storage) for _ in range(3))
    one.begin()
    assert len(two.history.deaths) == 1
    assert one.history.deaths == ()  # it lives, or it would not ask
    two.begin()
    assert [death.number for death in three.history.deaths] == [1, 2]


def test_what_a_stopped_driver_left_is_no_death(storage: Storage) -> None:
    Worker(storage, "run-1").begin()
    assert Worker(storage, "run-2").history.deaths == ()
    assert Worker(storage, "run-1", pass_=1).history.deaths == ()
    Worker(storage, "run-2").begin()
    assert Worker(storage, "run-3").history.deaths == ()


def test_deaths_count_across_runs(storage: Storage) -> None:
    """An engine that was seen to die, and a worker that Ray replaced, stay dead for the next driver."""
    Worker(storage, "run-1").die()
    Worker(storage, "run-1", pass_=1).begin()
    Worker(storage, "run-1", pass_=1).begin()
    assert [death.number for death in Worker(storage, "run-2").history.deaths] == [1, 2]


def test_a_zombie_of_an_older_run_kills_nobody(storage: Storage) -> None:
    zombie, living = Worker(storage, "run-1"), Worker(storage, "run-2")
    zombie.begin()
    living.begin()
    zombie.begin(["a"])
    zombie.begin(["b"])
    assert living.history.deaths == ()
    assert Worker(storage, "run-3").history.deaths == ()


def test_one_worker_that_comes_back_to_a_shard_is_one_death_at_most(storage: Storage) -> None:
    one = Worker(storage)
    for rows in (None, ["a"], ["b"]):
        one.begin(rows)
    deaths = Worker(storage).history.deaths
    assert [death.rows for death in deaths] == [("b",)]


def test_numbers_are_never_given_twice(storage: Storage) -> None:
    one, two = Worker(storage), Worker(storage)
    one.begin()
    late = [one.attempts.another(SHARD, 0, 1), two.attempts.another(SHARD, 0, 1)]
    assert [attempt.number for attempt in late] == [2, 3]


def test_a_row_is_condemned_by_an_engine_seen_dead_or_by_two_that_vanished(storage: Storage) -> None:
    Worker(storage).die(["seen"], "out of registers")
    Worker(storage).begin(["vanished"])
    assert Worker(storage).history.condemned == {"seen"}
    assert Worker(storage).history.reason("seen") == "out of registers"
    Worker(storage).begin(["vanished"])
    assert Worker(storage).history.condemned == {"seen", "vanished"}
    assert Worker(storage).history.reason("vanished") == "the process that ran it was gone"


def test_company_condemns_nobody(storage: Storage) -> None:
    for _ in range(5):
        Worker(storage).die()
        Worker(storage).die(["a", "b"])
    assert Worker(storage).history.condemned == frozenset()


def test_rows_of_a_group_that_died_run_singly_and_first(storage: Storage) -> None:
    rows = [f"r{i}" for i in range(2 * GROUP_ROWS + 5)]
    suspects = rows[GROUP_ROWS : 2 * GROUP_ROWS]
    Worker(storage).die(suspects)
    groups = list(Worker(storage).history.groups(rows))
    singly = [[rows.index(row)] for row in suspects]
    assert groups[: len(suspects)] == singly
    assert [len(group) for group in groups[len(suspects) :]] == [GROUP_ROWS, 5]
    Worker(storage).die([suspects[0]])
    assert [rows.index(suspects[0])] not in list(Worker(storage).history.groups(rows))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(0, 100), poisonous=st.sets(st.integers(0, 99), max_size=3), tells=st.booleans())
def test_poisonous_rows_alone_are_condemned_at_a_bounded_price(
    rows: int, poisonous: set[int], tells: bool
) -> None:
    """Any rows, any of them poisonous: two workers each, or three where a worker cannot say what it died of."""
    storage = in_memory()
    ids = [f"r{i}" for i in range(rows)]
    bad = {f"r{i}" for i in poisonous if i < rows}
    for died in range(100):
        worker = Worker(storage)
        history = worker.history
        history.check("generate", "a part", most=6)
        answered = set()
        for group in history.groups(ids):
            names = [ids[place] for place in group]
            assert len(names) <= GROUP_ROWS
            attempt = worker.begin(names)
            if bad & {*names}:
                if tells:
                    worker.attempts.died(SHARD, attempt, "poison")
                break
            assert not answered & {*names}, "a row is run once by each worker"
            answered |= {*names}
        else:
            assert history.condemned == bad
            assert answered == {*ids} - bad
            assert died <= (2 if tells else 3) * len(bad)
            return
    raise AssertionError("it never ends")


def test_a_shard_that_dies_whole_is_given_up_in_this_run_and_tried_again_in_the_next(
    storage: Storage,
) -> None:
    for _ in range(3):
        Worker(storage).die()
    with pytest.raises(WorkerDied, match="process of the commit stage died 3 times at part-7"):
        Worker(storage).history.check("commit", "part-7", most=3)
    Worker(storage).history.check("commit", "part-7", most=4)
    Worker(storage, "run-2").history.check("commit", "part-7", most=3)


def in_vain(storage: Storage, times: int, first: int = 0) -> None:
    """Workers that die of the first row they are given."""
    for number in range(first, first + times):
        Worker(storage).die([f"r{number}"])


def test_an_engine_that_runs_nothing_is_broken_whatever_it_is_given(storage: Storage) -> None:
    in_vain(storage, BROKEN_AFTER - 1)
    Worker(storage).history.check("generate", "a part", most=6)
    in_vain(storage, 1, first=BROKEN_AFTER)
    with pytest.raises(EngineBroken, match=f"{BROKEN_AFTER} engines in a row .*run again"):
        Worker(storage).history.check("generate", "a part", most=6)
    # The message says to run again: that must be of use once the engine is mended.
    Worker(storage, "run-2").history.check("generate", "a part", most=6)


def test_one_group_that_is_answered_clears_the_engine(storage: Storage) -> None:
    in_vain(storage, BROKEN_AFTER - 1)
    fine = Worker(storage)
    fine.begin(["fine"])
    fine.die(["r900"])
    in_vain(storage, BROKEN_AFTER - 1, first=1000)
    Worker(storage).history.check("generate", "a part", most=6)


def test_half_way_to_that_verdict_rows_that_nobody_suspects_go_first(storage: Storage) -> None:
    rows = [f"r{i}" for i in range(100)]
    Worker(storage).die(rows[:GROUP_ROWS])
    in_vain(storage, BROKEN_AFTER // 2 - 2)
    assert len(next(Worker(storage).history.groups(rows))) == 1
    in_vain(storage, 1, first=BROKEN_AFTER // 2)
    assert len(next(Worker(storage).history.groups(rows))) == GROUP_ROWS


def test_records_are_cleared_for_one_shard_or_for_all(storage: Storage) -> None:
    Worker(storage).die()
    Attempts(storage, "prepare", "run-1").begin("f" * 16, 0)
    clear_attempts(storage, SHARD)
    assert [info.name for info in storage.list(FOLDER)] == [f"{FOLDER}/{'f' * 16}/prepare-000001.json"]
    clear_attempts(storage)
    assert list(storage.list(FOLDER)) == []


def test_records_that_a_store_does_not_give_up_are_left(storage: Storage) -> None:
    class Slow(Storage):
        def list(self, folder: str = "") -> list[ObjectInfo]:
            raise TransientStorageError("503")

    clear_attempts(Slow(storage.root))
