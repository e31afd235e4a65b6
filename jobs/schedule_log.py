"""What became of each time of a schedule: create-only records below the output's `.dray/schedule/<job>/`.

    20261122T010000Z.schedule.waiting.json                  the time has come
    20261122T010000Z.schedule.started-1795309200123.json    a run began (the number makes attempts distinct)
    20261122T010000Z.schedule.done.json                     it succeeded
    20261122T010000Z.schedule.failed-1795312800456.json     it ended with another exit code
    20261123T010000Z.schedule.skipped.json                  no run: overlap or missed, as the record says; or the schedule begins
    20261101T010000Z.backfill.done.json                     the same by `dray schedule backfill`

A time that is only `waiting` or `started` was left by a scheduler that ended; the next one takes it up. Where `output.path` has run variables each time has an
output of its own, and the records lie in the folder above the first of them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jobs.loading import LoadedJob
from jobs.schedule import id_of, moment_of
from pipelines.errors import SpecError
from pipelines.storage import Storage

By = Literal["schedule", "backfill"]
State = Literal["waiting", "started", "done", "failed", "skipped"]

_OPEN = frozenset({"waiting", "started"})
_NAME = re.compile(
    r"(?P<id>\d{8}T\d{6}Z)\.(?P<by>schedule|backfill)\.(?P<state>waiting|started|done|failed|skipped)(-\d+)?\.json"
)


@dataclass(frozen=True)
class Records:
    """Which times have which records, as one listing showed them."""

    states: Mapping[tuple[str, str], frozenset[str]]
    """(id of the time, by whom) → states."""

    def is_done(self, moment: datetime) -> bool:
        """Whether a run of this time succeeded, by schedule or backfill."""
        return any("done" in self.states.get((id_of(moment), by), ()) for by in ("schedule", "backfill"))

    @property
    def last(self) -> datetime | None:
        """The latest time that a scheduler has dealt with, or begun to; None before the first."""
        ids = [id_ for id_, by in self.states if by == "schedule"]
        return moment_of(max(ids)) if ids else None

    @property
    def unsettled(self) -> list[datetime]:
        """Times that a scheduler took up and nobody saw the end of, in order."""
        ids = [id_ for (id_, by), found in self.states.items() if by == "schedule" and found <= _OPEN]
        return [moment for id_ in sorted(ids) if not self.is_done(moment := moment_of(id_))]


class ScheduleLog:
    """The records of one job's schedule."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        """The folder of the records itself."""

    @classmethod
    def of(cls, job: LoadedJob) -> ScheduleLog:
        """That of a job, wherever its date takes its output."""
        options = job.spec.output.storage_options
        return cls(Storage(f"{_common_output(job)}/.dray/schedule/{job.spec.name}", options))

    def append(self, moment: datetime, by: By, state: State, **fields: Any) -> None:
        """Write one record; a second `done` or `skipped` of the same time leaves the first."""
        attempt = f"-{time.time_ns() // 1_000_000}" if state in ("started", "failed") else ""
        record = {
            "at": time.time(),
            "time": moment.isoformat(),
            "by": by,
            "state": state,
            **fields,
        }
        name = f"{id_of(moment)}.{by}.{state}{attempt}.json"
        self.storage.create(name, json.dumps(record, indent=1).encode())

    def read(self) -> Records:
        """One listing; no record is opened."""
        states: dict[tuple[str, str], set[str]] = {}
        for info in self.storage.list():
            if match := _NAME.fullmatch(info.name):
                states.setdefault((match["id"], match["by"]), set()).add(match["state"])
        return Records({key: frozenset(found) for key, found in states.items()})


def _common_output(job: LoadedJob) -> str:
    """`output.path`, or the folder that all of its dates are below; without a slash at its end.

    Raises SpecError where a run variable is part of a bucket's name: its dates have nothing in common.
    """
    written = job.unfilled.get(("output", "path"))
    if written is None:
        return job.spec.output.path.rstrip("/")
    before = str(written).partition("${run.")[0]
    scheme, separator, path = before.rpartition("://")
    if "/" not in path and not separator:
        return "."
    folder = path.rpartition("/")[0].rstrip("/")
    if separator and not folder and scheme not in ("file", "local"):
        raise SpecError(
            f"{job.where('output.path')}: output.path: {written} has a run variable in its bucket's name, so the schedule's "
            "records have no place that is the same for each run; put the variable after the bucket"
        )
    return f"{scheme}{separator}{folder}"
