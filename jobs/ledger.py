"""The ledger of an output: what every run did, as append-only records below `.dray/runs/<run id>/`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jobs.lock import current_user
from jobs.metering import Usage
from jobs.shared_ledger import Announcer
from pipelines import __version__
from pipelines.errors import DrayError, Interrupted, LimitReached
from pipelines.storage import Storage

log = logging.getLogger("dray")


def new_run_id() -> str:
    """Sorts by time, unique without coordination: `20261122T094512-3fa9c1`."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def is_run_id(text: str) -> bool:
    return re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", text) is not None


@dataclass
class Ended:
    """What the last record will say beside how the run ended."""

    usage: Callable[[], Usage] | None = None


class Ledger:
    """Writes the records of one run. Object stores cannot append, so each record is an object of its own."""

    def __init__(self, storage: Storage, run_id: str, announcer: Announcer | None = None) -> None:
        """`announcer`: tells the shared ledger of the run too, where there is one."""
        self.storage, self.run_id, self._next = storage, run_id, 0
        self._announcer = announcer

    def append(self, event: str, **fields: Any) -> None:
        record = {"event": event, "run_id": self.run_id, "at": time.time(), **fields}
        name = f".dray/runs/{self.run_id}/{self._next:06d}.json"
        self.storage.create(name, json.dumps(record, indent=1).encode())
        self._next += 1

    @contextlib.contextmanager
    def recorded(self, command: str, **fields: Any) -> Iterator[Ended]:
        """Write the first and the last record of what runs within: `command` and `fields`, and how it ended and
        what it used, if what runs says so.

        Raises Interrupted, which says that nothing is lost, for KeyboardInterrupt.
        """
        self.started(command=command, **fields)
        if self._announcer is not None:
            self._announcer.started(self.run_id, command, fields.get("fingerprint", ""))
        state, message, ended = "failed", "", Ended()
        try:
            yield ended
            state = "succeeded"
        except (KeyboardInterrupt, Interrupted) as error:
            state, message = "interrupted", str(error) or "stopped by the user"
            raise Interrupted(
                f"{message}; committed shards are kept in {self.storage.url('')}: run the same command again to take up "
                "the rest"
            ) from None
        except DrayError as error:
            message = str(error)
            state = "interrupted" if isinstance(error, LimitReached) else "failed"
            raise
        finally:
            usage = asdict(ended.usage()) if ended.usage is not None else None
            if self._announcer is not None:
                self._announcer.ended(state, usage)
            try:
                self.append("ended", state=state, message=message, usage=usage)
            except DrayError as error:
                # A full disk, say: how the run ended matters more than that it is not written down.
                log.warning("the ledger does not say that this run ended: %s", error)
            if self._announcer is not None:
                self._announcer.close()

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
    command: str
    """`run`, `resume`, `retry-failed` or `verify --repair`."""
    started_at: float
    ended_at: float | None
    state: str
    """`running` until a last record says `succeeded`, `failed` or `interrupted`; a killed driver leaves `running`."""
    message: str
    usage: Usage | None
    """None until the run has ended, for `verify --repair`, and for runs of a Dray that did not count."""


def read_runs(storage: Storage) -> list[Run]:
    """All runs of an output, the oldest first. Records that cannot be read are named in a warning and left out."""
    records: dict[str, list[dict[str, Any]]] = {}
    for item in sorted(storage.list(".dray/runs"), key=lambda item: item.name):
        record = _record(storage, item.name)
        if record is not None:
            records.setdefault(record["run_id"], []).append(record)
    return [
        Run(
            run_id=run_id,
            command=events[0].get("command", "run"),
            started_at=events[0]["at"],
            ended_at=events[-1]["at"] if events[-1]["event"] == "ended" else None,
            state=events[-1].get("state", "running"),
            message=events[-1].get("message", ""),
            usage=Usage.from_dict(events[-1].get("usage")),
        )
        for run_id, events in sorted(records.items(), key=lambda run: (run[1][0]["at"], run[0]))
    ]


def _record(storage: Storage, name: str) -> dict[str, Any] | None:
    """One record with the keys that all have; None, and a warning, for what is none."""
    try:
        record = json.loads(storage.read(name))
        if isinstance(record["run_id"], str) and isinstance(record["event"], str):
            return {**record, "at": float(record["at"])}
        why = "its keys have other types"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        why = repr(error)
    log.warning("%s is no record of a run (%s): it is left out", storage.url(name), why)
    return None
