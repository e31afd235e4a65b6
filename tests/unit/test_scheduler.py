"""The foreground scheduler and backfills, with real processes for runs and a clock that goes faster than ours."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import scheduler
from jobs.backfill import backfill
from jobs.loading import LoadedJob, load
from jobs.lock import OutputLock
from jobs.schedule import ScheduleSettings, id_of
from jobs.schedule_log import ScheduleLog
from jobs.scheduler import Runs, run_schedule, sort_out
from pipelines.errors import (
    Interrupted,
    JobError,
    OutputLocked,
    SpecError,
    StorageError,
    TransientStorageError,
)
from pipelines.storage import Storage

pytestmark = pytest.mark.slow


START = datetime(2026, 11, 22, 12, 0, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "SLEEP_S", 0.01)
    monkeypatch.setattr(scheduler, "TICK_S", 0.01)


@dataclass(frozen=True, kw_only=True)
class Scripts(Runs):
    """Runs that are a line of shell; `$date` is the time, `$folder` a place of their own."""

    folder: Path
    line: str = "true"

    def start(self, moment: datetime) -> subprocess.Popen[bytes]:
        env = {"date": moment.isoformat(), "folder": str(self.folder), "PATH": "/usr/bin:/bin"}
        line = f'echo "$date" >> "$folder/log"; {self.line}'
        return subprocess.Popen(["sh", "-c", line], env=env, start_new_session=True)

    @property
    def begun(self) -> list[str]:
        log = self.folder / "log"
        return [line[:16] for line in log.read_text().splitlines()] if log.exists() else []


def job(folder: Path, **schedule: Any) -> LoadedJob:
    return load(
        {
            "name": "nightly",
            "input": {"path": str(folder / "in")},
            "prompt": {"template": "{{ x }}"},
            "model": {"source": "org/model"},
            "output": {"path": f"{folder}/out/${{run.date}}/"},
            "schedule": {"cron": "* * * * *", **schedule},
        }
    )


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def clock_of(*steps: datetime | Callable[[], Any]) -> Callable[[], datetime]:
    """A clock that shows one time after the other. What is no time is called, and holds the clock while it says False."""
    left, now = deque(steps), START

    def clock() -> datetime:
        nonlocal now
        while left:
            step = left[0]
            if isinstance(step, datetime):
                now = step
                left.popleft()
                break
            if step() is False:
                break
            left.popleft()
        return now

    return clock


def run_until_stopped(
    folder: Path, runs: Runs, *clock: datetime | Callable[[], Any], **schedule: Any
) -> list[str]:
    lines: list[str] = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run_schedule(job(folder, **schedule), runs, notify=lines.append, clock=clock_of(*clock))
    return lines


def minutes(*offsets: float) -> list[datetime]:
    return [START + timedelta(minutes=offset) for offset in offsets]


def test_a_new_scheduler_waits_for_the_next_time_and_runs_each_once(tmp_path: Path) -> None:
    runs = Scripts(target="j.yaml", folder=tmp_path)
    steady: list[Any] = []
    for i in range(40):  # three minutes, each shown several times
        steady += minutes(i / 13)
    three: Callable[[], bool] = lambda: len(runs.begun) == 3  # noqa: E731
    run_until_stopped(tmp_path, runs, *steady, three, stop, overlap="queue")
    assert runs.begun == ["2026-11-22T12:01", "2026-11-22T12:02", "2026-11-22T12:03"]
    assert not ScheduleLog.of(job(tmp_path)).read().unsettled


@pytest.mark.parametrize(
    ("missed", "expected"),
    [
        ("run_all", ["2026-11-22T12:01", "2026-11-22T12:02", "2026-11-22T12:03"]),
        ("run_once", ["2026-11-22T12:03"]),
        ("skip", []),
    ],
)
def test_missed_times(tmp_path: Path, missed: str, expected: list[str]) -> None:
    runs = Scripts(target="j.yaml", folder=tmp_path)
    log = ScheduleLog.of(job(tmp_path))
    log.append(START.replace(second=0), "schedule", "done")
    later = START + timedelta(minutes=3.8)  # 12:04:18
    settled: Callable[[], bool] = lambda: len(runs.begun) == len(expected) and not log.read().unsettled  # noqa: E731
    every = {"missed": missed, "cron": "1,2,3 * * * *"}
    run_until_stopped(tmp_path, runs, *[later] * 20, settled, stop, **every)
    assert runs.begun == expected
    # Whoever starts after that has missed nothing.
    run_until_stopped(tmp_path, runs, *[later] * 20, stop, **every)
    assert runs.begun == expected


def test_times_are_missed_from_the_first_scheduler_on(tmp_path: Path) -> None:
    runs = Scripts(target="j.yaml", folder=tmp_path)
    run_until_stopped(tmp_path, runs, *minutes(0, 0, 0), stop)
    log = ScheduleLog.of(job(tmp_path))
    assert log.read().last == START
    settled: Callable[[], bool] = lambda: len(runs.begun) == 2 and not log.read().unsettled  # noqa: E731
    every = {"missed": "run_all", "cron": "0,1,2 * * * *"}
    run_until_stopped(tmp_path, runs, *minutes(3, 3, 3), settled, stop, **every)
    assert runs.begun == ["2026-11-22T12:01", "2026-11-22T12:02"]  # 12:00 was before


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [("skip", ["12:01", "12:04"]), ("queue", ["12:01", "12:02", "12:03", "12:04"])],
)
def test_a_time_that_comes_while_a_run_goes_on(tmp_path: Path, overlap: str, expected: list[str]) -> None:
    runs = Scripts(target="j.yaml", folder=tmp_path, line='until test -e "$folder/go"; do sleep 0.01; done')
    log = ScheduleLog.of(job(tmp_path))
    first, second, third, fourth = minutes(0.6, 1.6, 2.6, 3.6)
    steps: list[Any] = [*minutes(0), *[first] * 9, *[second] * 9, *[third] * 9, (tmp_path / "go").touch]
    nothing_left: Callable[[], bool] = lambda: not log.read().unsettled  # noqa: E731
    # Until those that wait are done, the clock stands; then comes the fourth.
    steps += [nothing_left, *[fourth] * 9, lambda: len(runs.begun) == len(expected) and nothing_left(), stop]
    run_until_stopped(tmp_path, runs, *steps, overlap=overlap)
    assert [line[-5:] for line in runs.begun] == expected


def test_a_stop_ends_the_run_and_the_next_scheduler_takes_it_up(tmp_path: Path) -> None:
    line = 'trap "echo ended >> \\"$folder/ends\\"; exit 130" TERM; touch "$folder/up"; while :; do sleep 0.01; done'
    runs = Scripts(target="j.yaml", folder=tmp_path, line=line)
    came = minutes(0.6)[0]
    run_until_stopped(tmp_path, runs, *minutes(0), came, (tmp_path / "up").exists, stop)
    assert (tmp_path / "ends").read_text() == "ended\n"
    assert [id_of(moment) for moment in ScheduleLog.of(job(tmp_path)).read().unsettled] == [
        "20261122T120100Z"
    ]
    quick = Scripts(target="j.yaml", folder=tmp_path)
    log = ScheduleLog.of(job(tmp_path))
    done: Callable[[], bool] = lambda: not log.read().unsettled  # noqa: E731
    lines = run_until_stopped(tmp_path, quick, *[came] * 9, done, stop)
    assert lines[0] == "2026-11-22T12:01+00:00: was not finished, is taken up"
    assert quick.begun == ["2026-11-22T12:01"] * 2
    assert log.read().is_done(minutes(0.5)[0])


def test_a_failed_run_is_written_down_and_the_schedule_goes_on(tmp_path: Path) -> None:
    runs = Scripts(target="j.yaml", folder=tmp_path, line="exit 1")
    log = ScheduleLog.of(job(tmp_path))
    steps: list[Any] = [*minutes(0), *[minutes(0.6)[0]] * 60, *[minutes(1.6)[0]] * 9]
    settled: Callable[[], bool] = lambda: len(runs.begun) == 2 and not log.read().unsettled  # noqa: E731
    lines = run_until_stopped(tmp_path, runs, *steps, settled, stop, overlap="queue")
    assert next(line for line in lines if "failed" in line) == "2026-11-22T12:01+00:00: failed"
    assert not log.read().is_done(minutes(0.5)[0])


@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_fault_of_the_store_neither_ends_the_run_nor_loses_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    line = 'trap "touch \\"$folder/hit\\"; exit 130" TERM; until test -e "$folder/go"; do sleep 0.01; done'
    runs = Scripts(target="j.yaml", folder=tmp_path, line=line)
    append, calls = ScheduleLog.append, 0

    def faulty(self: ScheduleLog, *args: Any, **fields: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            raise TransientStorageError("the store does not answer")
        append(self, *args, **fields)

    monkeypatch.setattr(ScheduleLog, "append", faulty)
    log = ScheduleLog.of(job(tmp_path))
    steps: list[Any] = [*minutes(0), *[minutes(0.6)[0]] * 9, *[minutes(1.6)[0]] * 9, (tmp_path / "go").touch]
    settled: Callable[[], bool] = lambda: len(runs.begun) == 2 and not log.read().unsettled  # noqa: E731
    lines = run_until_stopped(tmp_path, runs, *steps, settled, stop, overlap="queue")
    assert "the store does not answer; trying on" in lines
    assert runs.begun == ["2026-11-22T12:01", "2026-11-22T12:02"]
    assert not (tmp_path / "hit").exists()


def test_an_end_that_cannot_be_written_down_does_not_hide_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Scripts(
        target="j.yaml",
        folder=tmp_path,
        line='trap "exit 0" TERM; touch "$folder/up"; while :; do sleep 0.01; done',
    )
    append = ScheduleLog.append

    def faulty(self: ScheduleLog, moment: datetime, by: Any, state: Any, **fields: Any) -> None:
        if state == "done":
            raise StorageError("permission denied")
        append(self, moment, by, state, **fields)

    monkeypatch.setattr(ScheduleLog, "append", faulty)
    lines = run_until_stopped(tmp_path, runs, *minutes(0, 0.6), (tmp_path / "up").exists, stop)
    assert lines[-1] == (
        "2026-11-22T12:01+00:00: its end is not written down, so it is run again: permission denied"
    )


def test_a_signal_ends_a_sleep_and_waits_for_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "TICK_S", 0.2)
    with scheduler.Signals().taken() as signals:
        assert (
            signals.asked is False
        )  # an event's lock may be held by the very thread that the handler interrupts
        sender = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
        sender.start()
        began = time.monotonic()
        signals.wait(30)
        assert time.monotonic() - began < 5
        assert signals.asked is True
        sender.join()


def test_of_two_schedulers_the_second_is_refused(tmp_path: Path) -> None:
    held = ScheduleLog.of(job(tmp_path)).storage
    with (
        OutputLock(held, "other", heartbeat_s=0.05, stale_s=0.3),
        pytest.raises(OutputLocked, match="another scheduler of nightly is at work"),
    ):
        run_schedule(job(tmp_path), Scripts(target="j.yaml", folder=tmp_path))


def test_a_backfill_runs_each_time_once_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    made = job(tmp_path, cron="0 2 * * *", timezone="Europe/Berlin")
    line = 'case "$date" in 2026-03-29*) test -e "$folder/mended";; esac'
    runs = Scripts(target="j.yaml", folder=tmp_path, line=line)
    days = {"first": datetime(2026, 3, 28, tzinfo=UTC), "last": datetime(2026, 3, 31, 12, tzinfo=UTC)}
    with pytest.raises(JobError, match=r"2026-03-29T03:00\+02:00: failed"):
        backfill(made, runs, **days)
    (tmp_path / "mended").touch()
    assert backfill(made, runs, **days) == {"times": 4, "done_before": 1, "done": 3}
    assert backfill(made, runs, **days) == {"times": 4, "done_before": 4, "done": 0}
    assert [line[5:10] for line in runs.begun] == ["03-28", "03-29", "03-29", "03-30", "03-31"]
    with pytest.raises(SpecError, match="no time from"):
        backfill(made, runs, first=datetime(2099, 1, 1, tzinfo=UTC), last=datetime(2099, 2, 1, tzinfo=UTC))


@given(
    missed=st.sampled_from(["run_once", "skip", "run_all"]),
    ages=st.lists(st.integers(0, 500), max_size=12, unique=True),
)
def test_every_time_is_run_or_left_out(missed: Any, ages: list[int]) -> None:
    times = [START - timedelta(seconds=age) for age in sorted(ages, reverse=True)]
    come = sort_out(ScheduleSettings(cron="* * * * *", missed=missed), times, START)
    assert sorted([*come.left_out, *come.catch_up, *come.on_time]) == times
    assert all((START - moment).total_seconds() <= scheduler.MISSED_S for moment in come.on_time)
    assert come.left_out == sorted(come.left_out)
    wanted = len(come.catch_up) + len(come.on_time)
    if missed == "run_all":
        assert wanted == len(times)
    elif missed == "run_once":
        assert bool(wanted) == bool(times)  # the latest one is always run
        assert not times or times[-1] not in come.left_out


@pytest.mark.parametrize(
    "override",
    [
        "output.storage_options.sas=hush",
        "output.storage_options={client_kwargs: {x: hush}}",
        "output={path: s3://b/, storage_options: {sas: hush}}",
        "model.hf_token=hush",
        "model.env={HF_TOKEN: hush}",
        "model.env=[{HF_TOKEN: hush}]",
        "model.hf_token=${env:HF_TOKEN:-hush}",
        "input.path=ftp://me:hush@host/x",
    ],
)
def test_secrets_in_overrides_are_neither_recorded_nor_printed(tmp_path: Path, override: str) -> None:
    plain = (
        "prompt.template={{ x }}",
        "pool.replicas=2",
        "model.env={A: b}",
        "model.hf_token=${env:HF_TOKEN}",
    )
    runs = Scripts(target="j.yaml", folder=tmp_path, line="exit 1", overrides=(*plain, override))
    run_until_stopped(tmp_path, runs, *minutes(0), *[minutes(0.6)[0]] * 60, stop)
    storage = ScheduleLog.of(job(tmp_path)).storage
    (name,) = [item.name for item in storage.list() if ".started-" in item.name]
    command = shlex.split(json.loads(storage.read(name))["command"])
    assert command[-5:-1] == list(plain)
    assert command[-1] == f"{override.partition('=')[0]}=***"
    with pytest.raises(JobError) as raised:
        backfill(job(tmp_path, cron="0 2 * * *"), runs, first=START - timedelta(days=400), last=START)
    assert "hush" not in str(raised.value)
    assert override in runs.arguments(START)  # the run itself has them


def test_records_lie_above_the_dates_and_are_told_from_the_output(tmp_path: Path) -> None:
    made = job(tmp_path)
    assert ScheduleLog.of(made).storage == Storage(str(tmp_path / "out/.dray/schedule/nightly"))
    one = load({**made.raw, "output": {"path": "s3://b/out/"}})
    assert ScheduleLog.of(one).storage.root == "s3://b/out/.dray/schedule/nightly"
    by_date = load({**made.raw, "output": {"path": "s3://b/${env:TEAM:-x}/d-${run.date}/h=${run.hour}"}})
    assert ScheduleLog.of(by_date).storage.root == "s3://b/x/.dray/schedule/nightly"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/${run.date}/x", "/"),
        ("/o-${run.date}", "/"),
        ("file:///${run.date}/x", "/"),
        ("/data/${run.date}", "/data/"),
        ("s3://b/${run.date}/", "s3://b/"),
        ("s3://b/d-${run.date}", "s3://b/"),
        ("s3://b-${run.date}/x", None),
        ("s3://${run.date}/x/", None),
    ],
)
def test_records_of_a_run_variable_in_the_first_part(tmp_path: Path, path: str, place: str | None) -> None:
    made = load({**job(tmp_path).raw, "output": {"path": path}})
    if place is None:
        with pytest.raises(SpecError, match=r"output\.path: .* has a run variable in its bucket's name"):
            ScheduleLog.of(made)
    else:
        assert ScheduleLog.of(made).storage.root == f"{place}.dray/schedule/nightly"
