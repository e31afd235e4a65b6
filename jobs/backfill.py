"""Times of a schedule that were left out, failed, or lie before the schedule's beginning: run in order, each once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.loading import LoadedJob
from jobs.schedule_log import ScheduleLog
from jobs.scheduler import Runs, Signals, due, ended, schedule_of, settle
from pipelines.errors import Interrupted, JobError, SpecError


def backfill(
    job: LoadedJob,
    runs: Runs,
    *,
    first: datetime,
    last: datetime,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run each time of the schedule in [first, last] that has not succeeded yet, in order; none of the future.

    Returns what became of the times. Raises JobError at the first run that fails, Interrupted on a signal; the same
    call takes up the rest.
    """
    schedule, log = schedule_of(job), ScheduleLog.of(job)
    until = min(last, datetime.now(UTC))
    times = due(schedule, first - timedelta(seconds=1), until)
    if not times:
        raise SpecError(f"the schedule has no time from {first.isoformat()} to {until.isoformat()}")
    records = log.read()
    left = [moment for moment in times if not records.is_done(moment)]
    with Signals().taken() as signals:
        for number, moment in enumerate(left, 1):
            name = moment.isoformat(timespec="minutes")
            notify(f"{name}: begins ({number} of {len(left)})")
            log.append(moment, "backfill", "started")
            signals.run = runs.start(moment)
            if signals.asked:
                signals.run.terminate()
            code = signals.run.wait()
            settle(log, moment, "backfill", code, stopped=signals.asked)
            notify(f"{name}: {ended(code)}")
            if signals.asked:
                raise Interrupted(f"stopped by {signals.name}; the same command takes up the rest")
            if code != 0:
                raise JobError(
                    f"the run of {name}: {ended(code)}; mend it, and the same command goes on with it: "
                    f"{runs.shown(moment)}"
                )
    return {"times": len(times), "done_before": len(times) - len(left), "done": len(left)}
