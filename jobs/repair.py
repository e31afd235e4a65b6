"""Make an output sound again: `dray verify --repair`.

What is damaged is moved to `.dray/damaged/`, never deleted, so that its shard counts as not done and `dray resume` makes
it anew. What can be derived from the parts (statistics, card, `_SUCCESS`) is made to agree with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jobs.books import ERRORS_OBJECT, SUCCESS, clear_superseded, clear_unreferenced_errors
from jobs.inspect import examine, opened, stored_report, verdict_of
from jobs.ledger import Ledger, new_run_id
from jobs.lock import OutputLock
from jobs.output import write_card, write_stats
from pipelines.storage import Storage

DAMAGED = ".dray/damaged"


def repair(
    storage: Storage, *, deep: bool, notify: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Repair an output and return `verify`'s verdict of what stands then, with `done`: what was changed, in words.

    `deep` looks for damage in every row, not only in the footers. `notify` gets a line while another run's lock is
    waited for; OutputLocked when that one is alive.
    """
    opened(storage)  # lest a folder that is no output get a lock
    storage.check_writable()
    run_id = new_run_id()
    with (
        OutputLock(storage, run_id, notify=notify) as lock,
        Ledger(storage, run_id).recorded("verify --repair", deep=deep),
    ):
        record, plan = opened(storage)
        clear_superseded(storage, plan)
        found = examine(storage, record, plan, deep=deep)
        names = dict.fromkeys(fault.name for fault in found.faults if fault.movable)
        lock.check()
        done = [
            f"moved {name} to {moved}"
            for name in [*names, *_failed_rows_of(storage, names)]
            if (moved := _move(storage, name, run_id))
        ]
        if done:
            found = examine(storage, record, plan, deep=False)
        books = found.books
        if found.faults or books.missing:
            if storage.exists(SUCCESS):
                storage.delete(SUCCESS)
                done.append(f"removed {SUCCESS}")
        else:
            clear_unreferenced_errors(storage, plan, books)
        write_stats(storage, books)
        write_card(storage, books, stored_report(storage, record, books))
        done.append("rebuilt stats/shards.parquet and README.md from the footers")
    return {**verdict_of(storage, found, deep=deep), "done": done}


def _failed_rows_of(storage: Storage, parts: Iterable[str]) -> list[str]:
    """The objects below `errors/` that belong to these parts, whatever their footers say."""
    stems = {name.removeprefix("data/").removesuffix(".parquet") for name in parts}
    return [
        info.name
        for info in storage.list("errors")
        if (match := ERRORS_OBJECT.fullmatch(info.name)) and match["part"] in stems
    ]


def _move(storage: Storage, name: str, run_id: str) -> str | None:
    """Where the object is now; None where it is gone, or has changed and is to be looked at again."""
    found = storage.read_versioned(name)
    if found is None:
        return None
    data, version = found
    # A copy and not a rename, which object stores lack. Nothing below `.dray/` ends in .parquet, or readers take it up.
    moved = f"{DAMAGED}/{run_id}/{name}.damaged"
    storage.create(moved, data)
    if storage.delete(name, version):
        return moved
    storage.delete(moved)
    return None
