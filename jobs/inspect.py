"""Look at an output: its status, its report, and whether its books are in order. Writes nothing."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType

from jobs.books import SUCCESS, Books, check_rows, committed_shards, fold
from jobs.ledger import read_runs
from jobs.lock import held_by
from jobs.output import read_spec
from jobs.planning import Plan, load_plan
from jobs.report import Report, make_report
from pipelines.errors import OutputError
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
    return _report(storage, record, fold(storage, plan))


def _report(storage: Storage, record: dict[str, Any], books: Books) -> Report:
    return make_report(
        job=record["name"],
        output=storage.url(),
        fingerprint=record["fingerprint"],
        books=books,
        runs=read_runs(storage),
        succeeded=storage.exists(SUCCESS) and books.complete,
        max_error_rate=record["max_error_rate"],
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
            {"run_id": run.run_id, "state": run.state, "started_at": run.started_at, "ended_at": run.ended_at}
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
        lines.append(f"run {run['run_id']} · {began:%Y-%m-%d %H:%M:%S} UTC · {run['state']} · {took:,.0f} s")
    return Group(*lines)


def verify(storage: Storage, *, deep: bool) -> dict[str, Any]:
    """Check the books; with `deep` also the key of every row.

    A job that is not finished is in order as far as it goes; `ok` is False for missing shards and for every problem.
    """
    _, plan = opened(storage)
    books = fold(storage, plan)
    problems = list(books.problems)
    schemas = {part.schema for part in books.parts}
    if len(schemas) > 1:
        problems.append(f"the parts have {len(schemas)} different schemas")
    if deep:
        problems += check_rows(storage, books)
    return {
        "output": storage.url(),
        "ok": not problems and not books.missing,
        "shards_planned": len(books.shards),
        "shards_committed": len(books.parts),
        "missing": [shard.part_name for shard in books.missing],
        "rows_in": books.totals.rows_in,
        "rows_ok": books.totals.rows_ok,
        "rows_failed": books.totals.rows_failed,
        "finished": storage.exists(SUCCESS),
        "deep": deep,
        "problems": problems,
    }


def render_verdict(verdict: dict[str, Any]) -> RenderableType:
    """Lines for the terminal."""
    how = "every key" if verdict["deep"] else "footers"
    if verdict["ok"]:
        word = "[green]in order[/]" + ("" if verdict["finished"] else ", but not finished (no _SUCCESS)")
    else:
        word = "[red]not in order[/]"
    lines = [
        f"{verdict['output']}: {word} ({how} read)",
        f"shards {verdict['shards_committed']:,} of {verdict['shards_planned']:,}; "
        f"rows {verdict['rows_in']:,} = {verdict['rows_ok']:,} ok + {verdict['rows_failed']:,} failed",
    ]
    lines += [f"missing: data/{name}" for name in verdict["missing"][:10]]
    if len(verdict["missing"]) > 10:
        lines.append(f"… and {len(verdict['missing']) - 10:,} more; `dray resume` runs them")
    lines += [f"problem: {problem}" for problem in verdict["problems"]]
    return Group(*lines)
