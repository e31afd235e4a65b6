"""A small scheduler in the foreground: sleeps to the next time, and runs `dray run` with its date as a process of its own.

    due ──missed policy──► to run or left out ──overlap policy──► waiting ──► one run at a time ──► record

What became of each time is written down (`jobs.schedule_log`), so that a scheduler that starts again knows what it has
missed and which run was cut short.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

import yaml

from jobs.child import start_dray
from jobs.ledger import new_run_id
from jobs.loading import LoadedJob
from jobs.lock import OutputLock
from jobs.references import MASK, is_one_reference, is_secret_name, masked
from jobs.schedule import ScheduleSettings, id_of
from jobs.schedule_log import By, ScheduleLog
from pipelines.errors import DrayError, Interrupted, OutputLocked, SpecError, TransientStorageError

#: A time that is older than this when it is seen was missed: this process, or the machine, was not there for it.
MISSED_S = 60.0
#: Seconds between two looks at a run, and at most between two looks at the clock, which may be set meanwhile.
TICK_S, SLEEP_S = 0.2, 5.0

Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How to start `dray run` for a time of one job."""

    target: str
    """The job file."""
    overrides: tuple[str, ...] = ()

    def arguments(self, moment: datetime) -> list[str]:
        """Those of `dray`."""
        date = moment.isoformat(timespec="seconds")
        return ["run", "--quiet", f"--date={date}", "--", self.target, *self.overrides]

    def shown(self, moment: datetime) -> str:
        """The command for people and records: what may be a secret in its overrides is masked."""
        return shlex.join(
            ["dray", *replace(self, overrides=tuple(map(_masked, self.overrides))).arguments(moment)]
        )

    def start(self, moment: datetime) -> subprocess.Popen[bytes]:
        return start_dray(self.arguments(moment))


class Signals:
    """SIGINT and SIGTERM, for a loop that looks at them; each is passed on to the run that goes on, if any."""

    def __init__(self) -> None:
        self.asked = False
        """Plain: a lock that this thread holds while it sleeps would stop the handler for good."""
        self.name = ""
        self.run: subprocess.Popen[bytes] | None = None

    @contextmanager
    def taken(self) -> Iterator[Signals]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._heard)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.run is not None and self.run.poll() is None:  # an error of ours ended the loop
                self.run.terminate()
                self.run.wait()

    def wait(self, seconds: float) -> None:
        """Sleep; at most `TICK_S` more once a signal comes."""
        until = time.monotonic() + seconds
        while not self.asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, TICK_S))

    def _heard(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        self.asked = True
        if self.run is not None and self.run.poll() is None:
            self.run.send_signal(signal.SIGTERM)


def _masked(override: str) -> str:
    """`KEY=VALUE` with the mask for a value that may hold a secret; a reference without a default stays."""
    key, equals, value = override.partition("=")
    path = key.split(".")
    if path[0] in ("prompt", "sampling") or (is_one_reference(value) and ":-" not in value):
        return override
    secret = "storage_options" in override or is_secret_name(path[-1])
    if not secret:
        try:
            given = yaml.safe_load(value)
            secret = masked(given, path[-1]) != given
        except yaml.YAMLError:
            secret = True
    return f"{key}{equals}{MASK}" if secret else override


def schedule_of(job: LoadedJob) -> ScheduleSettings:
    """The job's schedule. Raises SpecError where it has none."""
    if job.spec.schedule is None:
        raise SpecError(f"{job.source}: schedule: missing; give one such as schedule: {{cron: '0 2 * * *'}}")
    return job.spec.schedule


def due(schedule: ScheduleSettings, after: datetime, until: datetime) -> list[datetime]:
    """The times in (after, until]."""
    return list(takewhile(lambda moment: moment <= until, schedule.times(after)))


@dataclass(frozen=True)
class Come:
    """Times that have come, by what is to become of them."""

    catch_up: list[datetime]
    """Missed ones that are run all the same, in order."""
    on_time: list[datetime]
    left_out: list[datetime]
    """Missed ones that are not run."""


def sort_out(schedule: ScheduleSettings, times: Sequence[datetime], now: datetime) -> Come:
    """What the policy for missed times makes of those that have come."""
    missed = [moment for moment in times if (now - moment).total_seconds() > MISSED_S]
    on_time = list(times[len(missed) :])
    if schedule.missed == "run_all":
        return Come(missed, on_time, [])
    if schedule.missed == "run_once" and not on_time:
        return Come(missed[-1:], [], missed[:-1])
    return Come([], on_time, missed)


def run_schedule(
    job: LoadedJob,
    runs: Runs,
    *,
    notify: Notify = lambda line: None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> None:
    """Run a job at the times of its schedule until SIGINT or SIGTERM, which end the run that goes on as well.

    Raises Interrupted then, and OutputLocked where another scheduler of this job is at work.
    """
    schedule, log = schedule_of(job), ScheduleLog.of(job)
    try:
        with OutputLock(log.storage, new_run_id()) as lock, Signals().taken() as signals:
            _Loop(schedule, log, runs, lock, signals, notify, clock).for_ever()
    except OutputLocked as error:
        raise OutputLocked(f"another scheduler of {job.spec.name} is at work: {error}") from None


class _Loop:
    def __init__(
        self,
        schedule: ScheduleSettings,
        log: ScheduleLog,
        runs: Runs,
        lock: OutputLock,
        signals: Signals,
        notify: Notify,
        clock: Callable[[], datetime],
    ) -> None:
        self.schedule, self.log, self.runs, self.lock = schedule, log, runs, lock
        self.signals, self.notify, self.clock = signals, notify, clock
        records = log.read()
        self.waiting = deque(moment.astimezone(schedule.zone) for moment in records.unsettled)
        self.running: datetime | None = None
        last = records.last
        if last is None:  # so that a scheduler after this one knows what it has missed, from now on
            last = clock().replace(microsecond=0)
            log.append(last, "schedule", "skipped", why="schedule begins")
        self.seen = last
        """All times up to this one are dealt with, or wait."""
        for moment in self.waiting:
            self.notify(f"{self._named(moment)}: was not finished, is taken up")

    def for_ever(self) -> None:
        while not self.signals.asked:
            self.lock.check()
            try:
                self._look_after_run()
                self._take_up(self.clock())
                if self.running is None and self.waiting:
                    self._start(self.waiting[0])
                    self.waiting.popleft()
            except (
                TransientStorageError
            ) as error:  # the run goes on; what was not written down is taken up anew
                self.notify(f"{error}; trying on")
                self.signals.wait(SLEEP_S)
            else:
                self.signals.wait(self._pause_s())
        while self.running is not None:
            try:
                self._look_after_run()
            except DrayError as error:
                self.notify(
                    f"{self._named(self.running)}: its end is not written down, so it is run again: {error}"
                )
                break
            time.sleep(TICK_S)
        raise Interrupted(f"stopped by {self.signals.name}; start it again to go on with the schedule")

    def _take_up(self, now: datetime) -> None:
        times = due(self.schedule, self.seen, now)
        if not times:
            return
        records = self.log.read()
        queued = {id_of(moment) for moment in self.waiting}  # by a look that a fault of the store cut short
        new = [moment for moment in times if id_of(moment) not in queued and not records.is_done(moment)]
        come = sort_out(self.schedule, new, now)
        if come.left_out:
            first, last = come.left_out[0], come.left_out[-1]
            # One record for all of them: the last one tells a later scheduler where to go on.
            times_ = len(come.left_out)
            self.log.append(last, "schedule", "skipped", why="missed", first=first.isoformat(), times=times_)
            self.notify(
                f"{self._named(last)}: missed, and left out"
                + (
                    f", with the {times_ - 1:,} times before it from {self._named(first)}"
                    if times_ > 1
                    else ""
                )
                + "; `dray schedule backfill` runs such times"
            )
        for moment in come.catch_up:
            self._queue(moment)
        for moment in come.on_time:
            before = self.running or (self.waiting[0] if self.waiting else None)
            if before is None or self.schedule.overlap == "queue":
                self._queue(moment)
            else:
                self.log.append(moment, "schedule", "skipped", why="overlap", running=before.isoformat())
                self.notify(f"{self._named(moment)}: left out, that of {self._named(before)} still runs")
        self.seen = times[-1]

    def _queue(self, moment: datetime) -> None:
        self.log.append(moment, "schedule", "waiting")
        self.waiting.append(moment)

    def _start(self, moment: datetime) -> None:
        self.log.append(moment, "schedule", "started", command=self.runs.shown(moment))
        self.notify(f"{self._named(moment)}: begins")
        self.running, self.signals.run = moment, self.runs.start(moment)
        if self.signals.asked:  # between the last look and the start
            self.signals.run.terminate()

    def _look_after_run(self) -> None:
        run = self.signals.run
        if self.running is None or run is None or (code := run.poll()) is None:
            return
        settle(self.log, self.running, "schedule", code, stopped=self.signals.asked)
        self.notify(f"{self._named(self.running)}: {ended(code)}")
        self.running = None

    def _pause_s(self) -> float:
        if self.running is not None or self.waiting:
            return TICK_S
        upcoming = next(self.schedule.times(self.seen), None)
        left = SLEEP_S if upcoming is None else (upcoming - self.clock()).total_seconds()
        return min(max(left, 0.0), SLEEP_S)

    def _named(self, moment: datetime) -> str:
        return moment.astimezone(self.schedule.zone).isoformat(timespec="minutes")


def settle(log: ScheduleLog, moment: datetime, by: By, code: int, *, stopped: bool) -> None:
    """Write down how a run ended. One that we `stopped` stays as begun: it is to be taken up again."""
    if code == 0:
        log.append(moment, by, "done")
    elif not stopped:
        log.append(moment, by, "failed", exit_code=code)


def ended(code: int) -> str:
    """An exit code in words."""
    known = {0: "done", 1: "failed", 2: "refused (bad input)", Interrupted.exit_code: "interrupted"}
    return known.get(code, f"ended with exit code {code}")
