"""`dray schedule next|run|backfill`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import click
from rich.markup import escape

from jobs.command import command, job_arguments, main, show, stderr
from pipelines.errors import SpecError


@main.group("schedule")
def schedule() -> None:
    """Run a job at the times of its `schedule`, or those that were left out."""


@command("next", schedule)
@job_arguments
@click.option("-n", "count", type=click.IntRange(min=1), default=5, show_default=True, help="How many times.")
def next_(target: str, overrides: tuple[str, ...], count: int, as_json: bool) -> None:
    """Show the next times of a job's schedule."""
    from jobs.scheduler import schedule_of
    from jobs.target import job_of

    found = schedule_of(job_of(target, overrides))
    times = [moment.isoformat() for moment in islice(found.times(datetime.now(UTC)), count)]
    show({"timezone": found.timezone, "times": times}, "\n".join(times), as_json=as_json)


@command("run", schedule)
@job_arguments
def run(target: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Stay in the foreground and run the job at its times; Ctrl-C or SIGTERM ends it and the run that goes on."""
    from jobs.scheduler import Runs, run_schedule, schedule_of

    job = job_file_of(target, overrides)
    upcoming = next(schedule_of(job).times(datetime.now(UTC)))
    _tell(f"{job.spec.name}: next at {upcoming.isoformat(timespec='minutes')}")
    run_schedule(job, Runs(target=target, overrides=overrides), notify=_tell)


@command("backfill", schedule)
@job_arguments
@click.option("--from", "first", required=True, metavar="DATE", help="The first day, or time.")
@click.option("--to", "last", required=True, metavar="DATE", help="The last day, whole, or the last time.")
def backfill(target: str, overrides: tuple[str, ...], first: str, last: str, as_json: bool) -> None:
    """Run the times of the schedule between two days, in order; those that are done are not run again."""
    from jobs.backfill import backfill as run_times
    from jobs.schedule import parse_moment
    from jobs.scheduler import Runs, schedule_of

    job = job_file_of(target, overrides)
    zone = schedule_of(job).zone
    begin, end = parse_moment(first, zone), parse_moment(last, zone)
    if len(last) == len("2026-11-22"):
        # by the clock of the zone: the day of a change has 23 or 25 hours
        end = (end.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=zone) - timedelta(seconds=1)
    if end < begin:
        raise SpecError(f"--to: {last} is before {first}")
    done = run_times(job, Runs(target=target, overrides=overrides), first=begin, last=end, notify=_tell)
    text = f"{done['times']} times: {done['done']} run, {done['done_before']} done before"
    show(done, text, as_json=as_json)


def job_file_of(target: str, overrides: tuple[str, ...]) -> Any:
    """The job of a job file; a schedule needs one."""
    from jobs.target import is_job_file, job_of

    if not is_job_file(target):
        raise SpecError(f"{target}: a schedule is run from its job file (*.yaml), not from an output")
    return job_of(target, overrides)


def _tell(line: str) -> None:
    stderr.print(escape(line))
