"""The ledger of an output: what every run did, as append-only records below `.dray/runs/<run id>/`."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jobs.lock import current_user
from pipelines import __version__
from pipelines.storage import Storage


def new_run_id() -> str:
    """Sorts by time, unique without coordination: `20261122T094512-3fa9c1`."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


class Ledger:
    """Writes the records of one run. Object stores cannot append, so each record is an object of its own."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage, self.run_id, self._next = storage, run_id, 0

    def append(self, event: str, **fields: Any) -> None:
        record = {"event": event, "run_id": self.run_id, "at": time.time(), **fields}
        name = f".dray/runs/{self.run_id}/{self._next:06d}.json"
        self.storage.create(name, json.dumps(record, indent=1).encode())
        self._next += 1

    def started(self, **fields: Any) -> None:
        """The first record: who runs what, where."""
        self.append(
            "started",
            host=socket.gethostname(),
            pid=os.getpid(),
            user=current_user(),
            python=platform.python_version(),
            dray_version=__version__,
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as the ledger tells it."""

    run_id: str
    started_at: float
    ended_at: float | None
    state: str
    """`running` until a last record says `succeeded`, `failed` or `interrupted`; a killed driver leaves `running`."""
    message: str


def read_runs(storage: Storage) -> list[Run]:
    """All runs of an output, the oldest first."""
    records: dict[str, list[dict[str, Any]]] = {}
    for item in sorted(storage.list(".dray/runs"), key=lambda item: item.name):
        record = json.loads(storage.read(item.name))
        records.setdefault(record["run_id"], []).append(record)
    return [
        Run(
            run_id=run_id,
            started_at=events[0]["at"],
            ended_at=events[-1]["at"] if events[-1]["event"] == "ended" else None,
            state=events[-1].get("state", "running"),
            message=events[-1].get("message", ""),
        )
        for run_id, events in sorted(records.items())
    ]
