"""A team's ledger: who ran what, where, with which result and at what price, as objects in one place.

    $DRAY_LEDGER/v1/<YYYYMMDD>/<run id>.start.json      when a run has its output's lock
    $DRAY_LEDGER/v1/<YYYYMMDD>/<run id>.end.json        when it ended

`DRAY_LEDGER` is a folder or any fsspec URL; the day is the run id's (UTC), or of an id of somebody else's the start's; such an id
is percent-encoded. Objects are created once and never changed. The
spec is not copied, nor messages, which may quote rows. Writing is done by a thread of its own; a ledger that cannot be
written is a warning, and costs a run `CLOSE_S` seconds at most.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from jobs.loading import LoadedJob
from jobs.lock import current_user
from pipelines import __version__
from pipelines.code import code_path
from pipelines.storage import Storage

log = logging.getLogger("dray")

LEDGER_VARIABLE = "DRAY_LEDGER"
LAYOUT = "v1"
#: Seconds that a run's end waits for the ledger.
CLOSE_S = 3.0
#: Seconds for which a passing fault of the ledger's store is tried again.
PATIENCE_S = 10.0
#: A submitted run has its id before it starts; it waits in a cluster's queue for no longer than this.
QUEUED = timedelta(days=14)
_USERINFO = re.compile(r"(?<=://)[^/@]*@")
_RECORD = re.compile(rf"{LAYOUT}/\d{{8}}/(?P<run>[^/]+)\.(?P<event>start|end)\.json")


def announcer(job: LoadedJob, storage: Storage) -> Announcer | None:
    """What tells the shared ledger of a run of this job; None where `DRAY_LEDGER` names none."""
    location = os.environ.get(LEDGER_VARIABLE)
    if not location:
        return None
    about = {
        "job": job.spec.name,
        "output": without_password(storage.url()),
        "model": without_password(job.spec.model.source),
        "model_revision": job.spec.model.revision,
        "simulated": job.spec.model.backend == "simulated",
    }
    return Announcer(location, about)


def without_password(url: str) -> str:
    """A URL without `user:password@`."""
    return _USERINFO.sub("", url)


class Announcer:
    """Writes the two records of one run, from a thread of its own. Never raises."""

    def __init__(self, location: str, about: dict[str, Any], close_s: float = CLOSE_S) -> None:
        self._location, self._about, self._close_s = location, about, close_s
        self._start: dict[str, Any] = {}
        self._orders: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="dray-shared-ledger", daemon=True)

    def started(self, run_id: str, command: str, fingerprint: str) -> None:
        self._start = {
            "run_id": run_id,
            "started_at": time.time(),
            "user": current_user(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": command,
            "fingerprint": fingerprint,
            "dray_version": __version__,
            **self._about,
        }
        self._thread.start()
        self._orders.put(("start", self._start))

    def ended(self, state: str, usage: dict[str, Any] | None) -> None:
        """`usage`: a `jobs.metering.Usage` as a dictionary, where the run counts."""
        self._orders.put(("end", {**self._start, "ended_at": time.time(), "state": state, "usage": usage}))
        self._orders.put(None)

    def close(self) -> None:
        """Give the thread a last moment."""
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            log.warning(
                "%s=%s does not answer: the shared ledger may lack this run",
                LEDGER_VARIABLE,
                without_password(self._location),
            )

    def _write_all(self) -> None:
        try:
            storage = Storage(self._location, patience_s=PATIENCE_S)
            commit = git_commit()
            while (order := self._orders.get()) is not None:
                event, record = order
                data = json.dumps({**record, "git_commit": commit}, indent=1).encode()
                storage.create(record_name(record["run_id"], event, record["started_at"]), data)
        except Exception as error:  # noqa: BLE001 - whatever the store's library raises, the run is not to end of it
            log.warning(
                "%s=%s: the shared ledger lacks this run: %s",
                LEDGER_VARIABLE,
                without_password(self._location),
                error,
            )


def record_name(run_id: str, event: str, started_at: float) -> str:
    """`v1/20261122/20261122T094512-3fa9c1.start.json`; `started_at` (Unix time) tells the day where the run id does not."""
    from jobs.ledger import is_run_id

    day = run_id[:8] if is_run_id(run_id) else f"{datetime.fromtimestamp(started_at, UTC):%Y%m%d}"
    return f"{LAYOUT}/{day}/{quote(run_id, safe='')}.{event}.json"


@cache
def git_commit() -> str | None:
    """The commit of the checkout that Dray runs from, `-dirty` with changes; None where it is none."""
    root = Path(code_path()).parent
    if not (root / ".git").exists():
        return None  # a repository further up is not Dray's

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=5)
        done.check_returncode()
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_records(
    storage: Storage, since: date | None, warn: Callable[[str], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run id → `start` and `end` records of the runs that started on `since` (UTC) or later, and of some before.

    `warn` gets a line per damaged record.
    """
    from jobs.books import each

    first = f"{LAYOUT}/{since - QUEUED:%Y%m%d}" if since else LAYOUT
    names = [item.name for item in storage.list(LAYOUT) if item.name >= first]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in each(names, lambda name: _read(storage, name, warn)):
        match = _RECORD.fullmatch(name)
        if record is not None and match is not None:
            found.setdefault(record["run_id"], {})[match["event"]] = record
    return found


def _read(storage: Storage, name: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    match = _RECORD.fullmatch(name)
    if match is None:
        warn(f"{storage.url(name)} is no record of a run: it is left out")
        return None
    try:
        record = json.loads(storage.read(name))
        known = all(isinstance(record[key], str) for key in ("run_id", "job", "output", "user", "command"))
        ended = match["event"] == "start" or isinstance(record["state"], str)
        if known and ended and record["run_id"] == unquote(match["run"]):
            return {**record, "started_at": float(record["started_at"])}
        why = "its keys have other values than a record's"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        why = repr(error)
    warn(f"{storage.url(name)} is damaged ({why}): it is left out")
    return None
