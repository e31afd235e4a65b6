"""Look at an output: its status, its report, and whether its books are in order. Writes nothing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape

from jobs.audit import audit, check_schemas
from jobs.books import SUCCESS, Books, Fault, committed_shards, fold
from jobs.dedup import duplicate_faults
from jobs.fingerprint import steps_of
from jobs.ledger import read_runs
from jobs.lock import held_by
from jobs.output import read_spec
from jobs.planning import Plan, load_plan
from jobs.report import Report, make_report
from pipelines.errors import OutputError
from pipelines.step_settings import step_names
from pipelines.storage import Storage


def opened(storage: Storage) -> tuple[dict[str, Any], Plan]:
    """The stored spec record and the plan of an output. Raises OutputError where there is none."""
    record = read_spec(storage)
    plan = load_plan(storage) if record else None
    if record is None or plan is None:
        raise OutputError(f"{storage.url()} is no output of a Dray job (it has no .dray/ with a plan)")
    return record, plan


def report_of(storage: Storage) -> Report:
    """The report of an output, finished or not."""
    record, plan = opened(storage)
    return stored_report(storage, record, fold(storage, plan))


def stored_report(storage: Storage, record: dict[str, Any], books: Books) -> Report:
    """The report of these books, by the spec that the output was claimed for."""
    return make_report(
        job=record["name"],
        output=storage.url(),
        fingerprint=record["fingerprint"],
        books=books,
        runs=read_runs(storage),
        succeeded=storage.exists(SUCCESS) and books.complete,
        max_error_rate=record["max_error_rate"],
        steps=step_names(steps_of(record["identity"])),
    )


def status(storage: Storage) -> dict[str, Any]:
    """How far the job is, from one listing, its plan, ledger and lock."""
    record, plan = opened(storage)
    committed = committed_shards(storage, plan)
    runs = read_runs(storage)
    holder = held_by(storage)
    return {
        "job": record["name"],
        "output": storage.url(),
        "finished": storage.exists(SUCCESS) and len(committed) == len(plan.shards),
        "shards_planned": len(plan.shards),
        "shards_committed": len(committed),
        "rows_committed": sum(shard.rows or 0 for shard in plan.shards if shard.id in committed),
        "rows_planned": sum(shard.rows or 0 for shard in plan.shards),
        "locked_by": asdict(holder) if holder else None,
        "runs": [
            {
                "run_id": run.run_id,
                "command": run.command,
                "state": run.state,
                "started_at": run.started_at,
                "ended_at": run.ended_at,
            }
            for run in runs
        ],
    }


def render_status(found: dict[str, Any]) -> RenderableType:
    """Lines for the terminal."""
    lock = found["locked_by"]
    state = "finished" if found["finished"] else "running" if lock else "not finished"
    lines = [
        f"[bold]{found['job']}[/] · {state} · {found['output']}",
        f"shards {found['shards_committed']:,} of {found['shards_planned']:,}, "
        f"rows {found['rows_committed']:,} of {found['rows_planned']:,} (where known before reading)",
    ]
    if lock:
        lines.append(f"locked by run {lock['run_id']} on {lock['host']}, pid {lock['pid']}")
    for run in found["runs"]:
        began = datetime.fromtimestamp(run["started_at"], UTC)
        took = (run["ended_at"] or time.time()) - run["started_at"]
        lines.append(
            f"{run['command']} {run['run_id']} · {began:%Y-%m-%d %H:%M:%S} UTC · {run['state']} · {took:,.0f} s"
        )
    return Group(*lines)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """An output held against its plan."""

    books: Books
    faults: tuple[Fault, ...]
    """Those of the books, and what only schemas and rows tell."""
    without_digest: int = 0
    """Parts whose bytes could not be compared, because their footers hold no digest."""


def examine(storage: Storage, record: dict[str, Any], plan: Plan, *, deep: bool) -> Findings:
    """Read all footers; with `deep` all rows too."""
    books = fold(storage, plan)
    faults = [*books.faults, *check_schemas(plan, books, record["identity"])]
    faults += duplicate_faults(storage, books, record["identity"], deep=deep)
    if not deep:
        return Findings(books=books, faults=tuple(faults))
    rows = audit(storage, plan, books, record["identity"])
    return Findings(books=books, faults=(*faults, *rows.faults), without_digest=rows.without_digest)


def verify(storage: Storage, *, deep: bool) -> dict[str, Any]:
    """Check that every planned row stands in the output once: by the footers; with `deep` by the rows themselves.

    A job that is not finished is in order as far as it goes; `ok` is False for missing shards and for every problem.
    """
    record, plan = opened(storage)
    return verdict_of(storage, examine(storage, record, plan, deep=deep), deep=deep)


def verdict_of(storage: Storage, found: Findings, *, deep: bool) -> dict[str, Any]:
    """Findings as JSON values."""
    books = found.books
    return {
        "output": storage.url(),
        "ok": not found.faults and not books.missing,
        "shards_planned": len(books.shards),
        "shards_committed": len(books.parts),
        "missing": [shard.part_name for shard in books.missing],
        "rows_in": books.totals.rows_in,
        "rows_added": books.totals.rows_added,
        "rows_ok": books.totals.rows_ok,
        "rows_failed": books.totals.rows_failed,
        "rows_dropped": books.totals.rows_dropped,
        "finished": storage.exists(SUCCESS),
        "deep": deep,
        "without_digest": found.without_digest,
        "problems": [fault.text for fault in found.faults],
    }


def render_verdict(verdict: dict[str, Any]) -> RenderableType:
    """Lines for the terminal."""
    how = "every row" if verdict["deep"] else "footers"
    if verdict["ok"]:
        word = "[green]in order[/]" + ("" if verdict["finished"] else ", but not finished (no _SUCCESS)")
    else:
        word = "[red]not in order[/]"
    added = f" + {verdict['rows_added']:,} added" if verdict["rows_added"] else ""
    lines = [
        f"{escape(verdict['output'])}: {word} ({how} read)",
        f"shards {verdict['shards_committed']:,} of {verdict['shards_planned']:,}; "
        f"rows {verdict['rows_in']:,}{added} = {verdict['rows_ok']:,} ok + {verdict['rows_failed']:,} failed"
        + (f" + {verdict['rows_dropped']:,} dropped" if verdict["rows_dropped"] else ""),
    ]
    if verdict["without_digest"]:
        lines.append(f"{verdict['without_digest']:,} parts have no digest: their bytes were not compared")
    lines += [f"done: {escape(done)}" for done in verdict.get("done", ())]
    lines += [f"missing: data/{name}" for name in verdict["missing"][:10]]
    if len(verdict["missing"]) > 10:
        lines.append(f"… and {len(verdict['missing']) - 10:,} more")
    lines += [f"problem: {escape(problem)}" for problem in verdict["problems"]]
    if verdict["missing"]:
        lines.append("`dray resume` runs the missing shards")
    elif verdict["problems"] and "done" not in verdict:
        lines.append("`dray verify --repair` moves away what is damaged, so that `dray resume` runs it anew")
    return Group(*lines)
