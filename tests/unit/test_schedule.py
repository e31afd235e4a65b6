"""Schedules: which times they mean, across changes of the clock, and what run variables say at such a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.fingerprint import fingerprint, identity
from jobs.loading import LoadedJob, load
from jobs.output import claim
from jobs.schedule import ScheduleSettings, id_of, moment_of, parse_moment, variables_of
from jobs.target import job_of
from pipelines.errors import SpecError
from pipelines.storage import Storage

pytestmark = pytest.mark.slow


#: Clocks that change at 01:00 UTC, at 02:00, at midnight, by half an hour, and never.
ZONES = (
    "Europe/Berlin",
    "America/New_York",
    "Asia/Beirut",
    "America/Havana",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "UTC",
)
BERLIN = ZoneInfo("Europe/Berlin")


#: UTC of some of their changes in 2026, forward and back.
CHANGES = [
    datetime.fromisoformat(text).replace(tzinfo=UTC)
    for text in (
        *("2026-03-29T01:00", "2026-10-25T01:00", "2026-03-08T07:00", "2026-11-01T06:00", "2026-03-28T22:00"),
        *("2026-10-24T21:00", "2026-03-08T05:00", "2026-11-01T05:00", "2026-10-03T15:30", "2026-04-04T15:00"),
    )
]
STARTS = st.one_of(
    st.datetimes(datetime(2024, 1, 1), datetime(2027, 12, 31), timezones=st.just(UTC)),
    st.builds(
        lambda change, minutes: change + timedelta(minutes=minutes),
        st.sampled_from(CHANGES),
        st.integers(-90, 90),
    ),
)


def times(cron: str, zone: str, after: datetime, n: int) -> list[str]:
    found = ScheduleSettings(cron=cron, timezone=zone).times(after)
    return [moment.isoformat(timespec="minutes") for moment in islice(found, n)]


def fields(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    return st.one_of(
        st.just("*"),
        st.integers(2, 30).map(lambda step: f"*/{step}"),
        number.map(str),
        st.lists(number, min_size=2, max_size=3).map(lambda several: ",".join(map(str, several))),
    )


CRONS = st.tuples(
    fields(0, 59), fields(0, 23), st.sampled_from(["*", "1", "29", "*/10"]), st.just("*"), fields(0, 6)
)


@settings(max_examples=50)
@given(
    cron=CRONS.map(" ".join),
    zone=st.sampled_from(ZONES),
    after=STARTS,
)
def test_times_increase_strictly_and_exist_in_their_zone(cron: str, zone: str, after: datetime) -> None:
    found = list(islice(ScheduleSettings(cron=cron, timezone=zone).times(after), 30))
    assert len(found) == 30
    instants = [moment.astimezone(UTC) for moment in [after, *found]]
    assert all(a < b for a, b in pairwise(instants))
    for moment in found:
        assert str(moment.tzinfo) == zone
        assert moment.astimezone(UTC).astimezone(ZoneInfo(zone)).isoformat() == moment.isoformat()
    # Asked again from any of them, the rest is the same: a scheduler that restarts sees the same times.
    again = list(islice(ScheduleSettings(cron=cron, timezone=zone).times(found[9]), 20))
    assert [m.isoformat() for m in again] == [m.isoformat() for m in found[10:]]


@settings(max_examples=50)
@given(
    zone=st.sampled_from(ZONES),
    after=STARTS,
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
)
def test_a_daily_time_comes_once_on_every_day(zone: str, after: datetime, hour: int, minute: int) -> None:
    found = islice(ScheduleSettings(cron=f"{minute} {hour} * * *", timezone=zone).times(after), 40)
    days = [moment.date() for moment in found]
    assert all(b - a == timedelta(days=1) for a, b in pairwise(days))


def test_a_time_that_the_clock_leaps_over_and_one_that_it_shows_twice() -> None:
    assert times("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 28, tzinfo=UTC), 3) == [
        "2026-03-28T02:30+01:00",
        "2026-03-29T03:00+02:00",
        "2026-03-30T02:30+02:00",
    ]
    assert times("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 12, tzinfo=UTC), 2) == [
        "2026-10-25T02:30+02:00",
        "2026-10-26T02:30+01:00",
    ]
    # 00:45 UTC is the second 02:45 on the wall's clock but for the offset: the first 02:50 is past.
    assert times("50 2 * * *", "Europe/Berlin", datetime(2026, 10, 25, 1, 45, tzinfo=UTC), 1) == [
        "2026-10-26T02:50+01:00"
    ]
    assert times("0 * * * *", "Europe/Berlin", datetime(2026, 10, 24, 23, tzinfo=UTC), 3) == [
        "2026-10-25T02:00+02:00",
        "2026-10-25T02:00+01:00",
        "2026-10-25T03:00+01:00",
    ]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"cron": "0 2 * *"}, "expected five fields"),
        ({"cron": "0 0 2 * * *"}, "expected five fields"),
        ({"cron": "61 2 * * *"}, "'61 2 * * *': bad minute"),
        ({"cron": "0 0 30 2 *"}, "bad day-of-month"),
        ({"cron": "0 0 * 2 mon#5", "timezone": "Europe/Berln"}, "did you mean Europe/Berlin?"),
        ({"cron": "0 0 * * *", "overlap": "kill"}, "'skip' or 'queue'"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace("*", r"\*").replace("?", r"\?")):
        ScheduleSettings(**given_)


def daily(date: str | None = None, **sections: Any) -> LoadedJob:
    return load(
        {
            "name": "daily",
            "input": {"path": "s3://b/in/date=${run.date}/hour=${run.hour}/"},
            "prompt": {"template": "{{ x }}", "system": "Today is ${run.date}."},
            "model": {"source": "org/model"},
            "output": {"path": "s3://b/out/${run.id}/"},
            "schedule": {"cron": "30 0 * * *", "timezone": "Europe/Berlin"},
            **sections,
        },
        date=date,
    )


def test_run_variables_are_those_of_the_schedule_s_zone() -> None:
    assert variables_of(parse_moment("2026-11-22T00:30", BERLIN)) == {
        "date": "2026-11-22",
        "hour": "00",
        "datetime": "2026-11-22T00:30:00+01:00",
        "id": "20261121T233000Z",
    }
    job = daily("2026-11-21T23:30Z")
    assert job.spec.input.path == "s3://b/in/date=2026-11-22/hour=00/"
    assert job.spec.output.path == "s3://b/out/20261121T233000Z/"
    assert daily("2026-11-22").variables["datetime"] == "2026-11-22T00:00:00+01:00"
    there = daily(schedule={"cron": "0 0 * * *", "timezone": "Pacific/Kiritimati"}).variables["date"]
    here = daily(schedule={"cron": "0 0 * * *", "timezone": "Pacific/Niue"}).variables["date"]
    assert there > here  # 25 hours apart: never the same day


def test_neither_the_date_nor_the_schedule_is_part_of_the_fingerprint() -> None:
    first, second = daily("2026-11-22"), daily("2026-11-23T05:00")
    other = daily("2026-11-23", schedule={"cron": "5 5 * * 1", "missed": "run_all"})
    assert first.spec.prompt.system != second.spec.prompt.system
    assert len({fingerprint(identity(job)) for job in (first, second, other)}) == 1
    assert fingerprint(identity(daily(sampling={"temperature": 0}))) != fingerprint(identity(first))


def test_an_output_of_one_date_keeps_it(tmp_path: Path) -> None:
    def claimed(path: str) -> str:
        made = daily("2026-11-22", output={"path": f"{tmp_path}/{path}"})
        storage, covered = Storage(made.spec.output.path), identity(made)
        claim(storage, made, fingerprint(covered), covered)
        return storage.root

    dated = claimed("dated/${run.date}")
    assert dated.endswith("/dated/2026-11-22")
    assert job_of(dated).spec.input.path == "s3://b/in/date=2026-11-22/hour=00/"
    with pytest.raises(SpecError, match="is the output of 2026-11-22"):
        job_of(dated, date="2026-11-23")
    growing = claimed("growing")
    assert job_of(growing, date="2026-11-23T07:00").spec.input.path == "s3://b/in/date=2026-11-23/hour=07/"


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "22.11.2026", "2026-11-22T25:00", ""])
def test_a_date_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected one such as 2026-11-22"):
        daily(text)


def test_a_moment_that_does_not_exist_becomes_the_next_one() -> None:
    assert parse_moment("2026-03-29T02:30", BERLIN).isoformat() == "2026-03-29T03:30:00+02:00"


@given(st.datetimes(datetime(2000, 1, 1), datetime(2099, 1, 1), timezones=st.sampled_from([UTC, BERLIN])))
def test_ids_name_seconds_and_sort_by_time(moment: datetime) -> None:
    whole = moment.replace(microsecond=0)
    assert moment_of(id_of(whole)).astimezone(UTC) == whole.astimezone(UTC)
    later = whole.astimezone(UTC) + timedelta(seconds=1)
    assert id_of(later) > id_of(whole)
