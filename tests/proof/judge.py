"""The promises of the commit and lock protocol, held against every effect on the store as it happens."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from jobs.books import SUCCESS
from jobs.lock import LOCK_NAME, Holder, OutputLock
from jobs.planning import Plan
from jobs.segment import decode
from pipelines.part import part_of
from tests.proof.schedule import Process, Schedule
from tests.proof.store import SLOWEST_S, Effect, Server

OUT = "bucket/out"
HEARTBEAT_S, STALE_S = 5.0, 30.0
#: How long a driver may go on after another has its lock: to the end of its next heartbeat. One that has just begun
#: (a read, a swap with lost answers) may come before it.
WINDOW_S = 2 * HEARTBEAT_S + 12 * SLOWEST_S


class Rows(NamedTuple):
    """What a part holds."""

    attempts: frozenset[str]
    """Attempts whose rows stand in it, merges left aside."""
    keys: tuple[tuple[str, int], ...]
    answers: dict[tuple[str, int], str]
    """The rows that merges have answered."""


@lru_cache(4096)
def rows_of(part: bytes, errors: bytes | None = None) -> Rows:
    """`errors`: its failed rows, where they are kept apart."""
    tables = [pq.read_table(io.BytesIO(data)) for data in (part, errors) if data is not None]
    rows = [row for table in tables for row in table.to_pylist()]
    texts = {(row["row_id"], row["sample_index"]): row["generated_text"] or "" for row in rows}
    messages = [row["error_message"] for row in rows if row["error_code"]]
    of_attempts = [text.removeprefix("attempt ") for text in texts.values() if text.startswith("attempt ")]
    return Rows(
        attempts=frozenset([*of_attempts, *messages]),
        keys=tuple((row["row_id"], row["sample_index"]) for row in rows),
        answers={key: text for key, text in texts.items() if text.startswith("merge ")},
    )


@lru_cache(4096)
def errors_object(part: bytes) -> str | None:
    """Where the part says that its failed rows are."""
    return part_of(io.BytesIO(part), "", "a part").footer.errors_object


class Judge:
    """Collects broken promises; `verdict` raises for them."""

    def __init__(self, schedule: Schedule, server: Server) -> None:
        self.schedule, self.server = schedule, server
        self.broken: list[str] = []
        self.overlap_s = 0.0
        """Longest time that two drivers believed to be the writer."""
        self.blind = 0
        """Effects in the window of stores without conditions."""
        self.repeated = 0
        """Parts and answers that such effects replaced."""
        self.doubled = 0
        """Superseded parts that workers put beside their successors after their driver's end, for the next run to clear."""
        self.contested = False
        """Somebody has written the lock in that window: for a while two may hold it."""
        self.locks: dict[str, tuple[Process, OutputLock | None]] = {}
        self._lock_changed_at = 0.0
        self._taken_at: list[tuple[float, str]] = []
        self._left_at: dict[str, float] = {}
        self._cancelled: dict[str, float] = {}
        self._first_keys: dict[str, list[tuple[str, int]]] = {}
        server.judges.append(self._look)

    def check(self, holds: bool, promise: str) -> None:
        if not holds:
            self.schedule.note(f"BROKEN: {promise}")
            self.broken.append(promise)

    def verdict(self, ended: dict[str, str]) -> None:
        if self.broken:
            trace = "\n".join(self.schedule.trace[-400:])
            raise AssertionError(
                f"{len(self.broken)} promises broken, first: {self.broken[0]}\n{ended}\n{trace}"
            )

    # ── effects ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, effect: Effect) -> None:
        name = effect.key.removeprefix(f"{OUT}/")
        self.blind += effect.blind and (
            name == LOCK_NAME or (name.endswith(".parquet") and name.startswith("data/"))
        )
        if name == LOCK_NAME:
            self._lock(effect)
            self._lock_changed_at = effect.at
        elif name == SUCCESS:
            self._success(effect)
        elif name.startswith("data/"):
            self._part(name, effect)
        elif name.startswith("errors/") and effect.after is None:
            self._errors(name, effect)

    def _lock(self, effect: Effect) -> None:
        self.contested |= effect.blind
        before = Holder.from_json(effect.before) if effect.before else None
        after = Holder.from_json(effect.after) if effect.after else None
        who = effect.process
        if after is not None and (before is None or before.token != after.token):
            self._taken_at.append((effect.at, after.token))
        if after is None and before is not None:
            self._left_at[before.token] = effect.at
        if before is None or effect.blind or self._is_own(before, who):
            return
        if after is None:
            self.check(False, f"{named(who)} removed the lock of {before.run_id}")
        elif after.token != before.token:
            process, _ = self.locks[before.token]
            gone = not process.alive and who is not None and who.machine == process.machine
            quiet = effect.at - self._lock_changed_at
            self.check(
                gone or quiet >= STALE_S,
                f"{after.run_id} took the lock of {before.run_id}, which was heard {quiet:.1f} s before",
            )

    def _is_own(self, holder: Holder, who: Process | None) -> bool:
        return holder.token in self.locks and self.locks[holder.token][0] is who

    def _part(self, name: str, effect: Effect) -> None:
        who = named(effect.process)
        plan = self._plan()
        if effect.after is None:
            planned = {f"data/{shard.part_name}" for shard in plan.shards}
            self.check(name not in planned, f"{who} removed {name}, which is planned")
            for old in plan.superseded:
                if f"data/{old.shard.part_name}" == name:
                    for shard in old.by:
                        there = f"{OUT}/data/{shard.part_name}" in self.server.objects
                        self.check(there, f"{who} removed {name} before {shard.part_name} was there")
            return
        rows = self.rows(effect.after)
        self.check(len(rows.attempts) <= 1, f"{name} mixes attempts {sorted(rows.attempts)}")
        self.check(len(set(rows.keys)) == len(rows.keys), f"{name} holds a row twice")
        for old in plan.superseded:
            if f"data/{old.shard.part_name}" == name and effect.before is None:
                standing = [f"{OUT}/data/{shard.part_name}" in self.server.objects for shard in old.by]
                self.doubled += all(standing)
        first = self._first_keys.setdefault(name, sorted(rows.keys))
        self.check(sorted(rows.keys) == first, f"{name} holds other rows than at first")
        if effect.before is None:
            return
        before = self.rows(effect.before)
        lost = {key for key, text in before.answers.items() if rows.answers.get(key) != text}
        if effect.blind:
            self.repeated += bool(lost) or before.attempts != rows.attempts
            return
        self.check(not lost, f"{who} lost answers that merges had put into {name}: {sorted(lost)}")
        same = rows.attempts <= before.attempts or not before.attempts
        self.check(
            same, f"{who} replaced {name} of {sorted(before.attempts)} by that of {sorted(rows.attempts)}"
        )

    def rows(self, part: bytes) -> Rows:
        """The rows of a part and those it keeps apart."""
        name = errors_object(part)
        there = self.server.objects.get(f"{OUT}/{name}") if name else None
        return rows_of(part, there.data if there else None)

    def _errors(self, name: str, effect: Effect) -> None:
        for key, there in self.server.objects.items():
            if key.startswith(f"{OUT}/data/part-"):
                self.check(
                    errors_object(there.data) != name,
                    f"{named(effect.process)} removed {name}, the failed rows of {key}",
                )

    def _success(self, effect: Effect) -> None:
        if effect.after is not None and not self.contested:
            self.finished(f"{named(effect.process)} wrote _SUCCESS")

    def finished(self, when: str) -> None:
        """`_SUCCESS` stands only over a whole dataset."""
        there = self.server.objects.keys()
        missing = [s.part_name for s in self._plan().shards if f"{OUT}/data/{s.part_name}" not in there]
        self.check(not missing, f"{when} while {missing} are missing")

    def _plan(self) -> Plan:
        prefix = f"{OUT}/.dray/plan/"
        found = sorted(key for key in self.server.objects if key.startswith(prefix))
        return Plan(tuple(decoded(i, self.server.objects[key].data) for i, key in enumerate(found)))

    # ── beliefs ─────────────────────────────────────────────────────────────────────────────────────────────────

    def watched(self, kind: type[OutputLock]) -> type[OutputLock]:
        """The product's lock, which tells the judge whenever it lets its driver go on."""
        judge = self

        class Watched(kind):  # type: ignore[misc, valid-type]
            def __init__(self, *given: Any, **more: Any) -> None:
                super().__init__(*given, **more)
                process = judge.schedule.process
                assert process is not None
                judge.locks[self._mine.token] = (process, self)

            def check(self) -> None:
                super().check()
                judge._goes_on(self)

        return Watched

    def _goes_on(self, lock: OutputLock) -> None:
        token, now = lock._mine.token, self.schedule.now
        process, _ = self.locks[token]
        mine = next(at for at, taker in self._taken_at if taker == token)
        for at, taker in self._taken_at:
            if at > mine and taker != token and self.locks[taker][0].alive:
                believed = min(now, self._left_at.get(taker, now)) - max(at, process.thaws_at)
                self.overlap_s = max(self.overlap_s, believed)
                self.check(
                    believed <= WINDOW_S,
                    f"{process.name} believes to be the writer {believed:.0f} s after {taker} took over",
                )
                break
        asked = self._cancelled.get(token)
        if asked is not None and not lock.cancelled_by and not self.contested:
            late = now - max(asked, process.thaws_at)
            self.check(
                late <= WINDOW_S, f"{process.name} has not heard of its cancellation after {late:.0f} s"
            )

    def cancelled(self, holder: Holder) -> None:
        """`cancel` said that it asked this one to stop."""
        self._cancelled.setdefault(holder.token, self.schedule.now)


@lru_cache(4096)
def decoded(number: int, data: bytes) -> Any:
    return decode(number, data, f"segment {number}")


def named(process: Process | None) -> str:
    return process.name if process else "-"
