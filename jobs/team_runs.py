"""`dray list`: a team's runs, from its shared ledger."""

from __future__ import annotations

import fnmatch
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.durations import seconds_of
from jobs.lock import held_by
from jobs.metering import Usage
from jobs.output import SPEC
from jobs.shared_ledger import read_records
from pipelines.errors import DrayError, SpecError
from pipelines.storage import Storage

STATES = ("running", "succeeded", "failed", "interrupted", "lost", "unknown")
#: Seconds for which an output that cannot be reached is asked for its lock.
_PATIENCE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class TeamRun:
    """One run of the team."""

    run_id: str
    job: str
    state: str
    """`succeeded`, `failed` or `interrupted`; without an end `running`, `lost` (no living process holds the output for
    it), or `unknown` where the output cannot be looked at from here."""
    user: str
    host: str
    command: str
    started_at: float
    ended_at: float | None
    output: str
    model: str | None
    model_revision: str | None
    dray_version: str | None
    git_commit: str | None
    fingerprint: str | None
    usage: Usage | None


def team_runs(
    ledger: Storage,
    *,
    state: str | None = None,
    name: str | None = None,
    since: float | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[TeamRun]:
    """The runs in a shared ledger, the newest first.

    `state`: one of `STATES`; `name`: a glob over job names; `since`: Unix time of the earliest start. `warn` gets one line
    for each record that cannot be read and is left out.
    """
    day = datetime.fromtimestamp(since, UTC).date() if since is not None else None
    wanted: list[tuple[dict[str, Any], bool]] = []
    for records in read_records(ledger, day, warn).values():
        record = records.get("end") or records["start"]
        if name is not None and not fnmatch.fnmatchcase(record["job"], name):
            continue
        if since is None or record["started_at"] >= since:
            wanted.append((record, "end" in records))
    with ThreadPoolExecutor(16) as pool:
        states = pool.map(lambda item: str(item[0]["state"]) if item[1] else _alive(item[0]), wanted)
        runs = [_run(record, found) for (record, _), found in zip(wanted, states, strict=True)]
    chosen = [run for run in runs if state in (None, run.state)]
    return sorted(chosen, key=lambda run: (run.started_at, run.run_id), reverse=True)


def parse_since(text: str, now: float | None = None) -> float:
    """Unix time of `7d` (so long ago), `2026-11-22` or a date and time; UTC where no zone is given. Raises SpecError."""
    seconds = seconds_of(text)
    if seconds is not None:
        return (time.time() if now is None else now) - seconds
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(f"--since: expected 7d, 12h, 2026-11-22 or a date and time, got {text!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _alive(record: dict[str, Any]) -> str:
    """State of a run without an end, by the lock of its output.

    Of a process on another machine the lock's counter tells: it moves with every heartbeat.
    """
    try:
        storage = Storage(record["output"], patience_s=_PATIENCE_S)
        holder = held_by(storage)
        elsewhere = storage.is_local and record.get("host") not in (None, socket.gethostname())
        if holder is None and elsewhere and not storage.exists(SPEC):
            return "unknown"  # a disk of the other host's
        if holder is None or holder.run_id != record["run_id"] or holder.is_dead():
            return "lost"
        if holder.is_here():
            return "running"
        until = time.monotonic() + 2 * holder.heartbeat_s + 1
        while time.monotonic() < until:
            time.sleep(min(1.0, holder.heartbeat_s / 2))
            later = held_by(storage)
            if later is None or later.run_id != record["run_id"]:
                return "lost"
            if later.beat != holder.beat:
                return "running"
        return "lost"
    except (DrayError, OSError):
        return "unknown"


def _run(record: dict[str, Any], state: str) -> TeamRun:
    plain = {
        name: record.get(name)
        for name in (
            "host",
            "model",
            "model_revision",
            "dray_version",
            "git_commit",
            "fingerprint",
            "ended_at",
        )
    }
    return TeamRun(
        run_id=record["run_id"],
        job=record["job"],
        state=state,
        user=record["user"],
        command=record["command"],
        started_at=record["started_at"],
        output=record["output"],
        usage=Usage.from_dict(record.get("usage")),
        **plain,  # type: ignore[arg-type]
    )


def to_dict(runs: Iterable[TeamRun]) -> dict[str, Any]:
    """JSON values."""
    return {"runs": [asdict(run) for run in runs]}


def render(runs: list[TeamRun]) -> RenderableType:
    """A table for the terminal."""
    if not runs:
        return "no runs"
    table = Table(box=None, pad_edge=False)
    for title in (
        "started (UTC)",
        "state",
        "job",
        "user",
        "took",
        "rows",
        "tokens in / out",
        "GPU h",
        "cost",
        "output",
    ):
        right = title in ("took", "rows", "tokens in / out", "GPU h", "cost")
        table.add_column(
            title,
            justify="right" if right else "left",
            overflow="fold" if title == "output" else "ellipsis",
            min_width={"state": 11, "job": 12}.get(title),
        )
    for run in runs:
        usage = run.usage
        took = f"{run.ended_at - run.started_at:,.0f} s" if run.ended_at else "–"
        cells = [
            f"{datetime.fromtimestamp(run.started_at, UTC):%Y-%m-%d %H:%M}",
            run.state,
            run.job,
            run.user,
            took,
        ]
        if usage is None:
            cells += ["–"] * 4
        else:
            cost = "–" if usage.cost_usd is None else f"${usage.cost_usd:,.2f}"
            cells += [
                f"{usage.rows:,}",
                f"{usage.prompt_tokens:,} / {usage.output_tokens:,}",
                f"{usage.gpu_s / 3600:,.2f}",
                cost,
            ]
        table.add_row(*map(escape, [*cells, run.output]))
    return table
