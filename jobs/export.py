"""A job's schedule for those who have a scheduler already: an Airflow DAG, a Dagster definition, a crontab line, a CronJob.

Each calls `dray run`, or for a cluster elsewhere `dray submit --follow`. Airflow and Dagster hand on the time that they run for, so that their own retries and backfills
fill in the right `${run.date}`; cron and Kubernetes do not tell it, so there it is the clock's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from jobs.export_kubernetes import cron_job
from jobs.loading import LoadedJob
from jobs.scheduler import schedule_of
from pipelines.errors import SpecError

_AIRFLOW = '''\
"""Runs the Dray job {name} at the times of its schedule. Made by `dray export airflow`; make it anew when the schedule changes.

Needs Airflow 2.4 or later. One run at a time (`max_active_runs`): a time that comes meanwhile waits. Of missed times {missed}.
"""

import pendulum
from airflow.timetables.trigger import CronTriggerTimetable

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.operators.bash import BashOperator

with DAG(
    dag_id={name!r},
    schedule=CronTriggerTimetable({cron!r}, timezone={timezone!r}),
    start_date=pendulum.datetime({start}, tz={timezone!r}),
    catchup={catchup},
    max_active_runs=1,
    tags=["dray"],
):
    BashOperator(
        task_id="run",
        # The time of the run, by the clock of the schedule's zone; a retry takes up what the first try left.
        bash_command={command!r},
        cwd={folder!r},
        retries=2,
    )
'''

_DAGSTER = '''\
"""Runs the Dray job {name} at the times of its schedule. Made by `dray export dagster`; make it anew when the schedule changes."""

import subprocess

import dagster as dg

COMMAND = {command!r}
ARGUMENTS = {arguments!r}
FOLDER = {folder!r}


class Time(dg.Config):
    date: str


@dg.op(name={op!r}, retry_policy=dg.RetryPolicy(max_retries=2, delay=60))
def run_dray(config: Time) -> None:
    """The job for one time; a retry takes up what the first try left."""
    run = subprocess.Popen([*COMMAND, "--date=" + config.date, "--", *ARGUMENTS], cwd=FOLDER)
    try:
        code = run.wait()
    except BaseException:
        run.terminate()  # shards in flight have their grace time
        run.wait()
        raise
    if code != 0:
        raise dg.Failure(f"dray ended with exit code {{code}}", allow_retries=code != 2)  # 2: bad input


@dg.job(name={job!r})
def dray_job() -> None:
    run_dray()


@dg.schedule(name={schedule!r}, job=dray_job, cron_schedule={cron!r}, execution_timezone={timezone!r})
def times(context: dg.ScheduleEvaluationContext):
{overlap}    date = context.scheduled_execution_time.isoformat(timespec="seconds")
    return dg.RunRequest(run_key=date, run_config={{"ops": {{{op!r}: {{"config": {{"date": date}}}}}}}})


defs = dg.Definitions(jobs=[dray_job], schedules=[times])
'''

_DAGSTER_SKIP = """\
    busy = dg.RunsFilter(
        job_name=dray_job.name,
        statuses=[dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED],
    )
    if context.instance.get_runs(busy, limit=1):
        return dg.SkipReason("an earlier run still goes on")
"""

_CRON = """\
# {name}: made by `dray export cron`. CRON_TZ is cronie's; a cron that does not know it goes by the machine's own zone.
# It holds for the lines below it as well. Missed times are not run; the next one takes up their files where
# output.path has no run variables, and `dray schedule backfill` runs them where it has.
CRON_TZ={timezone}
{cron} cd {folder} && flock {wait}{lock} {command}
"""

_MISSED = {
    "run_all": "each is run, in order",
    "run_once": "the latest is run",
    "skip": "the latest is run all the same (Airflow has no way to leave all of them out)",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the other scheduler is to call Dray."""

    target: str
    """The job file, as `folder` sees it."""
    folder: str
    """Where to run: relative paths in the job and the user's package are looked up there."""
    dray: str = "dray"
    """The program."""
    address: str | None = None
    """The Ray cluster that the runs are submitted to; None: each runs where the scheduler calls it."""
    overrides: tuple[str, ...] = ()
    image: str = ""
    """The container image, for Kubernetes."""
    today: datetime
    """When this is written; Airflow counts from its day."""

    @property
    def command(self) -> list[str]:
        """The program, its command and options."""
        if self.address is None:
            return [self.dray, "run", "--quiet"]
        return [self.dray, "submit", "--follow", "--address", self.address]


def airflow(job: LoadedJob, call: Call) -> str:
    """A Python file for the DAGs folder."""
    schedule = schedule_of(job)
    date = f'{{{{ (logical_date or dag_run.run_after).in_timezone("{schedule.timezone}").isoformat() }}}}'
    words = " ".join(_in_jinja(shlex.quote(word)) for word in (call.target, *call.overrides))
    # Airflow takes a command that ends in .sh for a file to read: the blank at the end keeps it from that.
    command = f"exec {_in_jinja(shlex.join(call.command))} --date='{date}' -- {words} "
    start = call.today.astimezone(schedule.zone)
    return _AIRFLOW.format(
        name=job.spec.name,
        cron=schedule.cron,
        timezone=schedule.timezone,
        start=f"{start.year}, {start.month}, {start.day}",
        catchup=schedule.missed == "run_all",
        missed=_MISSED[schedule.missed],
        command=command,
        folder=call.folder,
    )


def dagster(job: LoadedJob, call: Call) -> str:
    """A Python file with `defs`, a `Definitions`."""
    schedule = schedule_of(job)
    name = re.sub(r"\W", "_", job.spec.name, flags=re.ASCII)
    return _DAGSTER.format(
        name=job.spec.name,
        op=f"dray_{name}",
        job=f"dray_{name}_job",
        schedule=f"dray_{name}_schedule",
        cron=schedule.cron,
        timezone=schedule.timezone,
        command=call.command,
        arguments=[call.target, *call.overrides],
        folder=call.folder,
        overlap=_DAGSTER_SKIP if schedule.overlap == "skip" else "",
    )


def cron(job: LoadedJob, call: Call) -> str:
    """Lines for a crontab."""
    schedule = schedule_of(job)
    _plain_cron(schedule.cron, job)
    words = [*call.command, "--", call.target, *call.overrides]
    if any("\n" in word for word in (*words, call.folder)):
        raise SpecError(
            "a crontab line cannot hold a line break; take it out of the override, or of the path"
        )
    return _CRON.format(
        name=job.spec.name,
        timezone=schedule.timezone,
        cron=schedule.cron,
        folder=_in_crontab(shlex.quote(call.folder)),
        wait="-n " if schedule.overlap == "skip" else "",
        lock=f"/tmp/dray-{job.spec.name}.lock",
        command=_in_crontab(shlex.join(words)),
    )


def kubernetes(job: LoadedJob, call: Call) -> str:
    """A ConfigMap with the job file, all it extends merged in, and a CronJob that runs it."""
    schedule = schedule_of(job)
    _plain_cron(schedule.cron, job)
    if schedule.overlap == "queue":
        raise SpecError(
            f"{job.where('schedule.overlap')}: schedule.overlap: a CronJob cannot queue; give schedule.overlap=skip "
            "to this command, or use another scheduler"
        )
    return cron_job(job, schedule, call.image, call.command, submits=call.address is not None)


EXPORTS: dict[str, Callable[[LoadedJob, Call], str]] = {
    "airflow": airflow,
    "dagster": dagster,
    "cron": cron,
    "kubernetes": kubernetes,
}


def _in_jinja(text: str) -> str:
    """As a template of Airflow's that renders to the text: prompts in overrides hold braces of their own."""
    return f"{{{{ {text!r} }}}}" if re.search(r"\{[{%#]", text) else text


def _in_crontab(text: str) -> str:
    """Cron takes a bare % for the end of the line, inside of quotes too, and drops the backslash before it."""
    return text.replace("%", r"\%")


def _plain_cron(cron: str, job: LoadedJob) -> None:
    if special := re.search(r"[L#]", cron.upper().replace("JUL", "")):
        raise SpecError(
            f"{job.where('schedule.cron')}: schedule.cron: {special[0]} in {cron!r} is known to Dray, Airflow and "
            "Dagster, not to cron or Kubernetes"
        )
