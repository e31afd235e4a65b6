"""`schedule:` of a job file, the times that it means, and the run variables of such a time.

A time is an aware datetime of the schedule's zone. Where clocks go forward, a time that does not exist becomes the first
one that does; where they go back, a time that exists twice is taken once, the first: as Debian's cron does it, and
cronsim. Schedules of every hour or minute follow the hours that pass.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from typing import Literal
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError
from pydantic import field_validator

from pipelines.errors import SpecError
from pipelines.settings import Settings

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ID = "%Y%m%dT%H%M%SZ"


class ScheduleSettings(Settings):
    """When the job runs by itself: `dray schedule run`, and what `dray export` writes."""

    cron: str
    """Five fields, minute hour day month weekday: `0 2 * * *` is every day at 02:00."""
    timezone: str = "UTC"
    """The zone of `cron` and of the run variables, by its IANA name: `Europe/Berlin`."""
    overlap: Literal["skip", "queue"] = "skip"
    """What becomes of a time that comes while the run of an earlier one still goes on: it is left out, or waits."""
    missed: Literal["run_once", "skip", "run_all"] = "run_once"
    """What becomes of times that passed while no scheduler ran: the latest of them is run, none, or each in order."""

    @field_validator("cron")
    @classmethod
    def _has_times(cls, cron: str) -> str:
        fields = cron.split()
        if len(fields) != 5:
            raise ValueError(
                f"expected five fields (minute hour day month weekday), such as '0 2 * * *', got {cron!r}"
            )
        try:
            next(CronSim(cron, datetime(2000, 1, 1)))
        except CronSimError as error:
            raise ValueError(f"{cron!r}: {str(error).lower()}") from None
        except StopIteration:
            raise ValueError(f"{cron!r} names a day that never comes") from None
        return " ".join(fields)

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, timezone: str) -> str:
        known = available_timezones()
        if timezone not in known:
            near = difflib.get_close_matches(timezone, known, n=1)
            raise ValueError(
                f"unknown time zone {timezone!r}"
                + (f"; did you mean {near[0]}?" if near else "; expected one such as Europe/Berlin")
                + ("" if known else " (this machine has no time zones: install the package tzdata)")
            )
        return timezone

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    def times(self, after: datetime) -> Iterator[datetime]:
        """The times later than `after` (aware), in order, without end: for a few decades at least."""
        last = after
        for found in CronSim(self.cron, after.astimezone(self.zone)):
            # cronsim begins by the clock on the wall, which may show an hour for the second time; and it leaves a
            # midnight that does not exist as it is where the minutes begin with a star.
            moment = found.astimezone(UTC).astimezone(self.zone)
            if moment.astimezone(UTC) > last.astimezone(UTC):
                last = moment
                yield moment


def parse_moment(text: str, zone: ZoneInfo) -> datetime:
    """`2026-11-22`, `2026-11-22T02:00` (in `zone`) or with an offset, as a time of `zone`. Raises SpecError."""
    try:
        if _DATE.fullmatch(text):
            given = datetime.combine(date.fromisoformat(text), time())
        else:
            given = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(
            f"date: expected one such as 2026-11-22, 2026-11-22T02:00 or 2026-11-22T02:00:00+01:00, got {text!r}"
        ) from None
    aware = given if given.tzinfo else given.replace(tzinfo=zone)
    return aware.astimezone(UTC).astimezone(zone)  # a time that clocks leap over becomes one that exists


def id_of(moment: datetime) -> str:
    """`20261122T010000Z`: names a time, the same in every zone; sorts by time."""
    return moment.astimezone(UTC).strftime(_ID)


def moment_of(id_: str) -> datetime:
    """The time of an `id_of`, in UTC."""
    return datetime.strptime(id_, _ID).replace(tzinfo=UTC)


def variables_of(moment: datetime) -> dict[str, str]:
    """What `${run.date}`, `${run.hour}`, `${run.datetime}` and `${run.id}` stand for at a time.

    The first three are read off the clock of the time's zone (`2026-11-22`, `02`, `2026-11-22T02:00:00+01:00`), the
    last is UTC's (`20261122T010000Z`) and the only one that no other time of a schedule shares.
    """
    return {
        "date": moment.strftime("%Y-%m-%d"),
        "hour": moment.strftime("%H"),
        "datetime": moment.isoformat(timespec="seconds"),
        "id": id_of(moment),
    }
