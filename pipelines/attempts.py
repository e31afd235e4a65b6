"""How often a shard was tried and how far each worker came with it: small records that outlive workers and runs.

Ray calls a worker's replacement with the same shard for as long as workers die, and tells nobody how often. So each
stage writes down what it is about to do before it does it:

    .dray/attempts/<shard id>/generate-000001.json        a worker has begun: run, pass, worker; all rows
    .dray/attempts/<shard id>/generate-000001.died.json   it saw its engine die under it
    .dray/attempts/<shard id>/generate-000002.json        another worker, these 32 rows only

    begin ──first time──► run it              1 death ──► alone on its engine
      └──otherwise──► history ──► deaths ──►  max_attempts deaths ──► in groups of 32 rows, then one by one

The last record of a worker is how far it came. It died there if it said so, or if Ray called another worker for the
same pass of the driver; what a killed or stopped driver left behind is no death.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property

from pipelines.errors import EngineBroken, TransientStorageError, WorkerDied
from pipelines.storage import Storage

FOLDER = ".dray/attempts"
#: Rows that a suspect shard runs at a time: a poisonous row costs one more engine for its group and one for itself.
GROUP_ROWS = 32
#: Workers that may die one after the other before they have finished a single group: then the engine is at fault.
BROKEN_AFTER = 24
_RECORD = re.compile(r"(?P<stage>[a-z]+(-\d{1,2})?)-(?P<number>\d{6})(?P<died>\.died)?\.json")

#: `prepare`, `start`, `generate`, `between` or `commit`; with a number, `generate-1`, where a job has several pools.
Stage = str


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One record: what a worker was about to do."""

    number: int
    """From 1, per shard and stage."""
    run_id: str
    pass_: int
    """The driver's pass within its run; within one pass only Ray repeats a shard."""
    worker: str
    """One process, never reused."""
    rows: tuple[str, ...] | None
    """Ids of the rows it was about to run; None: the whole shard."""
    at: float
    """Unix time, by the worker's clock."""
    died: str | None = None
    """Of what the engine died, where the worker lived to tell."""


@dataclass(frozen=True)
class History:
    """Everything that was tried on one shard in one stage, in order, as `worker` sees it before it tries."""

    attempts: tuple[Attempt, ...]
    run_id: str
    pass_: int
    worker: str

    @property
    def latest(self) -> int:
        """Number of the last attempt; 0 for none."""
        return self.attempts[-1].number if self.attempts else 0

    @cached_property
    def deaths(self) -> tuple[Attempt, ...]:
        """Where workers died, in order."""
        last_of_worker = {attempt.worker: attempt for attempt in self.attempts}
        return tuple(
            attempt
            for attempt in last_of_worker.values()
            if attempt.died is not None or self._was_replaced(attempt)
        )

    def _was_replaced(self, attempt: Attempt) -> bool:
        of_pass = (attempt.run_id, attempt.pass_)
        if attempt.worker != self.worker and of_pass == (self.run_id, self.pass_):
            return True
        return any(
            other.number > attempt.number and (other.run_id, other.pass_) == of_pass
            for other in self.attempts
        )

    @cached_property
    def condemned(self) -> frozenset[str]:
        """Rows that ran alone when a worker died: once where it saw its engine die, twice where it vanished itself."""
        alone = [death for death in self.deaths if death.rows is not None and len(death.rows) == 1]
        times = Counter(death.rows for death in alone)
        return frozenset(
            death.rows[0]
            for death in alone
            if death.rows and (death.died is not None or times[death.rows] > 1)
        )

    def reason(self, row: str) -> str:
        """What the last worker said that died of this row alone."""
        said = [death.died for death in self.deaths if death.rows == (row,)]
        return next((text for text in reversed(said) if text), "the process that ran it was gone")

    def groups(self, row_ids: Sequence[str]) -> Iterator[list[int]]:
        """The rows to run, as positions in `row_ids`: the suspected ones singly and first; without the condemned."""
        suspected = {row for death in self.deaths for row in death.rows or ()}
        singly: list[list[int]] = []
        others: list[int] = []
        for position, row in enumerate(row_ids):
            if row in suspected:
                if row not in self.condemned:
                    singly.append([position])
            else:
                others.append(position)
        together = [others[start : start + GROUP_ROWS] for start in range(0, len(others), GROUP_ROWS)]
        if self._in_vain >= BROKEN_AFTER // 2:
            # Is there anything that this engine can run? See `check`.
            yield from (*together, *singly)
        else:
            yield from (*singly, *together)

    def check(self, stage: Stage, shard: str, most: int) -> None:
        """Raises WorkerDied after `most` deaths at the whole shard, EngineBroken where no engine runs anything.

        Only this run's count: whoever has mended something and runs again is given as many.
        """
        whole = sum(death.rows is None for death in self._in_this_run)
        if whole >= most:
            raise WorkerDied(f"the process of the {stage} stage died {whole} times at {shard}")
        if self._in_vain >= BROKEN_AFTER:
            raise EngineBroken(
                f"{self._in_vain} engines in a row died of the first rows they were given, of {shard}: the engine or "
                "its device is at fault rather than the rows; see the log, then run again"
            )

    @property
    def _in_this_run(self) -> list[Attempt]:
        return [death for death in self.deaths if death.run_id == self.run_id]

    @cached_property
    def _in_vain(self) -> int:
        """Latest workers of this run in a row that died in their first group."""
        groups = Counter(attempt.worker for attempt in self.attempts if attempt.rows is not None)
        workers = [death.worker for death in self._in_this_run if death.rows is not None]
        return len(list(itertools.takewhile(lambda worker: groups[worker] == 1, reversed(workers))))


class Attempts:
    """The records of one stage in one worker process. Methods block; they may be called from any thread."""

    def __init__(self, storage: Storage, stage: Stage, run_id: str) -> None:
        self._storage, self._stage, self._run_id = storage, stage, run_id
        self._worker = uuid.uuid4().hex

    def begin(self, shard_id: str, pass_: int) -> Attempt | None:
        """Record the first attempt of all at a shard; None when there was one before: see `history`."""
        first = self._attempt(1, pass_, None)
        return first if self._create(shard_id, first) else None

    def begin_whole(self, shard_id: str, pass_: int, *, name: str, most: int) -> None:
        """Record an attempt at a whole shard, by its `name` in messages. Raises WorkerDied after `most` that ended their
        process."""
        if not self.begin(shard_id, pass_):
            history = self.history(shard_id, pass_)
            history.check(self._stage, name, most=most)
            self.another(shard_id, pass_, history.latest)

    def history(self, shard_id: str, pass_: int) -> History:
        """What was tried before, from a fresh listing."""
        found: dict[int, str] = {}
        died: dict[int, str] = {}
        for info in self._storage.list(f"{FOLDER}/{shard_id}"):
            match = _RECORD.fullmatch(info.name.rpartition("/")[2])
            if match and match["stage"] == self._stage:
                number = int(match["number"])
                (died if match["died"] else found)[number] = info.name
        attempts = []
        for number, name in sorted(found.items()):
            record = json.loads(self._storage.read(name))
            rows = record["rows"]
            verdict = json.loads(self._storage.read(died[number])) if number in died else {}
            attempts.append(
                Attempt(
                    number=number,
                    run_id=record["run_id"],
                    pass_=record["pass"],
                    worker=record["worker"],
                    rows=None if rows is None else tuple(rows),
                    at=record["at"],
                    died=verdict.get("reason"),
                )
            )
        return History(tuple(attempts), self._run_id, pass_, self._worker)

    def another(self, shard_id: str, pass_: int, after: int, rows: Sequence[str] | None = None) -> Attempt:
        """Record a further attempt, at the whole shard or at some rows of it. `after`: the latest number known."""
        for number in itertools.count(after + 1):
            attempt = self._attempt(number, pass_, rows)
            if self._create(shard_id, attempt):
                return attempt
        raise AssertionError("unreachable")

    def died(self, shard_id: str, attempt: Attempt, reason: str) -> None:
        """Record that the engine died under this attempt."""
        verdict = {"reason": reason, "at": time.time()}
        name = self._name(shard_id, attempt.number).removesuffix(".json") + ".died.json"
        self._storage.create(name, json.dumps(verdict).encode())

    def withdraw(self, shard_id: str, attempt: Attempt) -> None:
        """Forget an attempt that was at nothing when the engine died."""
        self._storage.delete(self._name(shard_id, attempt.number))

    def _attempt(self, number: int, pass_: int, rows: Sequence[str] | None) -> Attempt:
        return Attempt(
            number=number,
            run_id=self._run_id,
            pass_=pass_,
            worker=self._worker,
            rows=None if rows is None else tuple(rows),
            at=time.time(),
        )

    def _create(self, shard_id: str, attempt: Attempt) -> bool:
        record = asdict(attempt)
        record["pass"] = record.pop("pass_")
        del record["died"]
        return self._storage.create(self._name(shard_id, attempt.number), json.dumps(record).encode())

    def _name(self, shard_id: str, number: int) -> str:
        return f"{FOLDER}/{shard_id}/{self._stage}-{number:06d}.json"


def clear_attempts(storage: Storage, shard_id: str = "") -> None:
    """Remove the records of a shard, or all: of no use once the parts stand. What is left over does no harm."""
    with ThreadPoolExecutor(32) as pool, contextlib.suppress(TransientStorageError):
        names = [info.name for info in storage.list(f"{FOLDER}/{shard_id}".rstrip("/"))]
        list(pool.map(storage.delete, names))
