"""The `dedup` step: which records of all parts are duplicates, once every part stands, and the parts without them.

    every part stands ─► a round is written down ─► keys of all parts ─► who goes ─► parts are rewritten ─► statistics, _SUCCESS

A **round** names what is compared for the first time: for each part the runs that have answered rows of it. Records of
earlier rounds win over later ones, and within a round those that come first in the plan. A record goes for one that
stays, so who goes follows from the rounds and from what stands, also when some of those that go are gone already: after
a crash the same is found again, and nothing needs to be undone. See docs/decisions/0009.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.books import SUCCESS, Books, Fault, each, fold
from jobs.fingerprint import steps_of
from jobs.planning import Plan
from pipelines.contracts import Work
from pipelines.counting import COUNTED, tally
from pipelines.dedup import duplicates, key_width
from pipelines.dedup_keys import KEYS, Keys, keys_from_part, keys_name, read_keys
from pipelines.errors import OutputError, PartDamaged
from pipelines.merge import Standing, rewrite
from pipelines.part import Footer, Part
from pipelines.shard_stats import ShardStats
from pipelines.step_settings import DedupStep, dedup_step, step_names
from pipelines.steps import part_schema
from pipelines.storage import Storage

ROUNDS = ".dray/dedup/rounds"
_ROUND = re.compile(ROUNDS + r"/(\d{6,})\.json")
_KEYS = re.compile(KEYS + r"/(?P<part>part-\d{6,}-[0-9a-f]{16})-[0-9a-f]{16}\.arrow")
#: Parts in memory at once while they are rewritten.
_WRITERS = 4
#: For each part by name a mask over its records that have not failed.
Verdict = Mapping[str, npt.NDArray[np.bool_]]


# ── Rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rounds:
    """What has been compared so far."""

    count: int
    of: Mapping[tuple[str, str], int]
    """(part, run) → the round in which the answers of the run in the part were compared first."""


def read_rounds(storage: Storage) -> Rounds:
    """The rounds of an output. Raises OutputError for one that cannot be read."""
    numbers = {
        info.name: int(match[1]) for info in storage.list(ROUNDS) if (match := _ROUND.fullmatch(info.name))
    }
    of: dict[tuple[str, str], int] = {}
    for name, data in each(numbers, storage.read):
        try:
            parts = json.loads(data)["parts"]
            pairs = [(part, run) for part, runs in parts.items() for run in runs]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{storage.url(name)} is damaged: {error!r}; restore it, or use a new output.path"
            ) from error
        for pair in pairs:
            of.setdefault(pair, numbers[name])
    return Rounds(max(numbers.values(), default=-1) + 1, of)


def uncompared(books: Books, rounds: Rounds) -> dict[str, list[str]]:
    """Part → runs whose answers in it no round has compared."""
    found = {
        part.name: [run for run in _runs_of(part.footer) if (part.name, run) not in rounds.of]
        for part in books.parts
    }
    return {name: runs for name, runs in found.items() if runs}


def _runs_of(footer: Footer) -> list[str]:
    runs = (footer.provenance.run_id, *(one.provenance.run_id for one in footer.retries))
    return list(dict.fromkeys(runs))


# ── The barrier ──────────────────────────────────────────────────────────────────────────────────────────────────


def drop_duplicates(
    storage: Storage,
    plan: Plan,
    books: Books,
    work: Work,
    *,
    check: Callable[[], None],
    notify: Callable[[str], None],
) -> Books:
    """Compare all records of complete books, rewrite the parts that hold duplicates, and fold the books again.

    `check` raises where this driver has lost the output; `notify` gets a line about what is dropped. To be called again
    after a crash, or at any other time. Raises OutputError for a part that is damaged.
    """
    step = dedup_step(work.steps)
    assert step is not None
    while True:
        check()
        rounds = read_rounds(storage)
        new = uncompared(books, rounds)
        if new:
            # Before anything is dropped: who wins must not depend on what a retry adds after a crash.
            data = json.dumps({"run_id": work.run_id, "parts": new}, sort_keys=True)
            storage.create(f"{ROUNDS}/{rounds.count:06d}.json", data.encode())
            continue  # with the one that stands: another driver may have been first
        verdict = _verdict(storage, books, step, read_keys, rounds)
        if verdict is not None and not verdict:
            break
        as_found = verdict is not None and _apply(storage, books, verdict, work, check, notify)
        books = fold(storage, plan)
        if not books.complete or (as_found and not uncompared(books, rounds)):
            break
        # Somebody has changed a part meanwhile: a merge of a retry whose driver is dead.
    _clear_keys(storage, books)
    return books


def _verdict(
    storage: Storage,
    books: Books,
    step: DedupStep,
    read: Callable[[Storage, Part, DedupStep], Keys | None],
    rounds: Rounds,
) -> Verdict | None:
    """Who goes, parts without such left out; None when a part has changed since the books were made."""
    sizes = np.array([part.footer.stats.samples for part in books.parts], np.int64)
    ends = np.cumsum(sizes)
    at = {part.name: slice(end - size, end) for part, size, end in zip(books.parts, sizes, ends, strict=True)}
    parts = {part.name: part for part in books.parts}
    total = int(sizes.sum())
    keys = np.empty((total, key_width(step)), np.uint8)
    of = np.zeros(total, np.int32)
    for name, found in each(parts, lambda name: read(storage, parts[name], step)):
        if found is None or len(found.keys) != parts[name].footer.stats.samples:
            return None
        if len(found.keys):
            keys[at[name]] = found.keys
            of[at[name]] = np.array([rounds.of.get((name, run), rounds.count) for run in found.runs])[
                found.run
            ]
    gone = duplicates(keys, of, step)
    return {name: gone[where] for name, where in at.items() if gone[where].any()}


def _apply(
    storage: Storage,
    books: Books,
    verdict: Verdict,
    work: Work,
    check: Callable[[], None],
    notify: Callable[[str], None],
) -> bool:
    """Rewrite the parts without their duplicates; False when one of them was another by then, and was left alone."""
    count = sum(int(gone.sum()) for gone in verdict.values())
    notify(f"dedup: dropping {count:,} duplicates from {len(verdict):,} of {len(books.parts):,} parts")
    parts = {part.name: part for part in books.parts}

    def thin(name: str) -> bool:
        check()
        return _thin(storage, parts[name], verdict[name], work)

    left_alone = [name for name, done in each(verdict, thin, _WRITERS) if not done]
    return not left_alone


def _thin(storage: Storage, part: Part, gone: npt.NDArray[np.bool_], work: Work) -> bool:
    """Rewrite one part without some of its records. Raises ShardError when it is gone or damaged."""
    done = False

    def thinned(standing: Standing) -> tuple[pa.Table, Footer] | None:
        nonlocal done
        before = standing.part.footer
        done = before.digest == part.footer.digest
        if not done:
            return None
        rows = standing.rows.cast(part_schema(work)).unify_dictionaries()
        good = np.flatnonzero(pc.is_null(rows["error_code"]).to_numpy())
        stays = np.ones(len(rows), bool)
        stays[good[gone]] = False
        rows = rows.filter(pa.array(stays))
        return rows, replace(before, stats=_without(before.stats, rows, step_names(work.steps)[-1]))

    rewrite(storage, part.footer.shard, thinned, work.output, work.steps)
    return done


def _without(stats: ShardStats, rows: pa.Table, name: str) -> ShardStats:
    """The statistics of a part of which only `rows` are left after the step `name`. What was spent stays spent."""
    left = tally(rows)
    counts, dropped = stats.steps[name], stats.samples - left.samples
    steps = {
        **stats.steps,
        name: {**counts, "out": counts["out"] - dropped, "dropped": counts["dropped"] + dropped},
    }
    return replace(
        stats,
        **{of: getattr(left, of) for of in COUNTED},
        rows_dropped=stats.rows_dropped + stats.rows_ok - left.rows_ok,
        steps=steps,
    )


def _clear_keys(storage: Storage, books: Books) -> None:
    """Remove the keys of attempts that came second, and of parts that were rewritten since.

    Only of parts that stand: another driver may have extended the plan, and its workers write keys before they commit.
    """
    referenced = {part.name.removesuffix(".parquet"): keys_name(part.footer) for part in books.parts}
    for info in storage.list(KEYS):
        match = _KEYS.fullmatch(info.name)
        if match and referenced.get(match["part"], info.name) != info.name:
            storage.delete(info.name)


# ── Verify ───────────────────────────────────────────────────────────────────────────────────────────────────────


def duplicate_faults(
    storage: Storage, books: Books, identity: Mapping[str, Any], *, deep: bool
) -> list[Fault]:
    """Answers that a finished output's `dedup` has not compared; with `deep` duplicates that are left, by the rows."""
    steps = steps_of(identity)
    step = dedup_step(steps)
    if step is None or books.missing:
        return []  # it has its turn when every part stands
    rounds = read_rounds(storage)
    finished = storage.exists(SUCCESS)
    new = uncompared(books, rounds)
    if new:
        return [
            Fault(
                name=f"data/{name}",
                text=f"data/{name}: the answers of run {', '.join(runs)} in it are not compared with the others yet: "
                "`dray resume` does that",
                movable=False,
            )
            for name, runs in new.items()
            if finished
        ]
    if not deep:
        return []
    try:
        verdict = _verdict(storage, books, step, keys_from_part, rounds)
    except (PartDamaged, FileNotFoundError):
        return []  # which the audit of the rows tells
    how = "`dray verify --deep --repair`, then `dray resume`, drops" if finished else "`dray resume` drops"
    return [
        Fault(
            name=f"data/{name}",
            text=f"data/{name}: {int(gone.sum()):,} records are duplicates (step {step_names(steps)[-1]}), the first is "
            f"row {_row_id(storage, name, int(gone.argmax()))}: {how} them",
            movable=False,
        )
        for name, gone in (verdict or {}).items()
    ]


def _row_id(storage: Storage, name: str, record: int) -> str:
    with storage.open_input(f"data/{name}") as file:
        rows = pq.read_table(file, columns=["row_id", "error_code"])
    return str(rows.filter(pc.is_null(rows["error_code"]))["row_id"][record])
