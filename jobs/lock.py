"""One writer per output: `.dray/lock.json`, taken create-only, kept alive by a heartbeat (design §4.9).

    with OutputLock(storage, run_id) as lock:       # OutputLocked: another driver writes here
        ...
        lock.check()                                # OutputLocked: somebody has taken it from us

The lock is a JSON object: who holds it, and a counter (`beat`) that the holder raises every `heartbeat_s` seconds by
compare-and-swap. Whoever finds it held watches the counter for `stale_s` seconds of its own monotonic clock: clocks
of two hosts are never compared, the times in the file are for people. A counter that moves means a living holder; one
that stands still is taken over, again by compare-and-swap, so that of many who wait one wins. A holder that was killed
on the same machine is recognised by its process and taken over at once.

A holder that slept through `stale_s` (a suspended machine) may find its lock gone and sets `lost`. What it committed
until then is sound: parts are create-only. On stores without conditional writes (see `pipelines.storage_other`) two
drivers that start within one round trip to the store may both take the lock; the next heartbeat of the first finds
the other's record and stops it.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pipelines.errors import DrayError, OutputLocked
from pipelines.storage import Storage

LOCK_NAME = ".dray/lock.json"
#: The start time of a process that is there but not for us to see (`hidepid`).
_HIDDEN = "hidden"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of the lock: who writes this output."""

    run_id: str
    host: str
    machine: str
    """Boot id and pid namespace: equal only where one process can see the other. Empty where unknown."""
    pid: int
    pid_started: str
    """Start time of the process in clock ticks since boot: tells it from a later one of the same pid."""
    user: str
    token: str
    """Random, one per acquisition: whose record this is."""
    since: float
    """Unix time by the holder's clock; only shown."""
    heartbeat_s: float
    beat: int = 0
    cancelled_by: str = ""
    """Who asked the holder to stop (`dray cancel`); the holder finds it at its next heartbeat."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Holder | None:
        """None for what is no record of ours (empty, damaged, written by a future version)."""
        try:
            fields = json.loads(data)
            return cls(
                **{"cancelled_by": "", **{n: fields[n] for n in cls.__dataclass_fields__ if n in fields}}
            )
        except (ValueError, KeyError, TypeError):
            return None

    def is_here(self) -> bool:
        """Whether the process is one of this machine, so that it can be seen from here."""
        return bool(self.machine) and (self.host, self.machine) == (socket.gethostname(), _machine())

    def is_dead(self) -> bool:
        """Whether the process certainly is gone: it ran on this machine and no longer does."""
        if not self.is_here():
            return False
        return _process_started(self.pid) not in (self.pid_started, _HIDDEN)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"run {self.run_id} (pid {self.pid} on {self.host}, user {self.user}, since {since})"


def held_by(storage: Storage) -> Holder | None:
    """Who holds the lock of an output now; None for nobody, or a record that cannot be read."""
    found = storage.read_versioned(LOCK_NAME)
    return Holder.from_json(found[0]) if found else None


def cancel(storage: Storage) -> Holder | None:
    """Ask whoever holds the lock of an output to stop; None where nobody does. Does not wait for it."""
    while True:
        found = storage.read_versioned(LOCK_NAME)
        holder = Holder.from_json(found[0]) if found else None
        if found is None or holder is None or holder.is_dead():
            return None
        asked = replace(holder, cancelled_by=f"{current_user()} on {socket.gethostname()}")
        if storage.replace(LOCK_NAME, asked.to_json(), found[1]):
            return holder
        time.sleep(0.05)  # it beat in between


class OutputLock:
    """The right to write one output, as a context manager; not reusable.

    `heartbeat_s`: seconds between signs of life; `stale_s`: seconds without one after which a lock is taken over.
    `notify` gets one line when there is something to wait for, or to worry about.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        heartbeat_s: float = 5.0,
        stale_s: float = 30.0,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.lost = threading.Event()
        """Set when another driver has taken the lock from us."""
        self._storage = storage
        self._stale_s = stale_s
        self._notify = notify or _log.warning
        self._taker: str = ""
        self.cancelled_by = ""
        """Who asked this run to stop, once somebody has."""
        self._released = threading.Event()
        self._heard_at = time.time()
        """When our latest sign of life was sent; wall clock, since a monotonic one stands still on a suspended machine."""
        self._thread: threading.Thread | None = None
        self._mine = Holder(
            run_id=run_id,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            pid_started=_process_started(os.getpid()),
            user=current_user(),
            token=uuid.uuid4().hex,
            since=time.time(),
            heartbeat_s=heartbeat_s,
        )

    def __enter__(self) -> OutputLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Raises OutputLocked once the lock is lost; no request, so it may be called often."""
        if self.lost.is_set():
            raise OutputLocked(
                f"{self._storage.root}: this run's lock was taken over by {self._taker}, which found no sign of life "
                "of ours; what is committed stays, `dray resume` continues when the other run has ended"
            )

    def confirm(self) -> None:
        """`check` with a look at the store, one request: a driver that slept does not know yet what it has lost.

        A lock that is gone counts as lost here: somebody may have taken it, done his work and given it back.
        """
        found = self._storage.read_versioned(LOCK_NAME)
        self._recognise(Holder.from_json(found[0]) if found else None)
        self.check()

    # ── taking it ───────────────────────────────────────────────────────────────────────────────────────────────

    def acquire(self) -> None:
        """Take the lock, or raise OutputLocked; returns at once where nobody holds it."""
        while not self._storage.create(LOCK_NAME, self._mine.to_json()):
            found = self._storage.read_versioned(LOCK_NAME)
            if found is None:
                time.sleep(0.05)
                continue  # released in between
            data, version = found
            holder = Holder.from_json(data)
            if holder is None or not holder.is_dead():
                if not self._stands_still(holder, version):
                    continue  # released while we watched
                who = str(holder) if holder else "an unreadable lock"
                self._notify(f"{self._storage.root}: no sign of life of {who}: taking over")
            if self._storage.replace(LOCK_NAME, self._mine.to_json(), version):
                break
            # another one was quicker: the next round looks at its record
        self._heard_at = time.time()
        self._thread = threading.Thread(target=self._renew, name="dray-lock", daemon=True)
        self._thread.start()

    def _stands_still(self, holder: Holder | None, version: str) -> bool:
        """Watches the lock: True when nothing moved for long enough, False when it went away, OutputLocked when it
        changed: a holder that breathes, or another driver that took over first."""
        patience_s = max(self._stale_s, 3 * holder.heartbeat_s if holder else 0.0)
        who = str(holder) if holder else "an unreadable lock"
        self._notify(
            f"{self._storage.root} is locked by {who}; watching for a sign of life, {patience_s:.0f} s at most"
        )
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, patience_s / 10))
            found = self._storage.read_versioned(LOCK_NAME)
            if found is None:
                return False
            if found[1] != version:
                now = Holder.from_json(found[0])
                raise OutputLocked(
                    f"{self._storage.root} is being written by {now or who}: wait for it or stop it; "
                    f"if it certainly is gone, delete {self._storage.url(LOCK_NAME)}"
                )
            if holder and holder.is_dead():
                return True
        return True

    # ── keeping it ──────────────────────────────────────────────────────────────────────────────────────────────

    def _renew(self) -> None:
        """The heartbeat. A store that fails for a while is no reason to stop: parts are create-only."""
        while not self._released.wait(self._mine.heartbeat_s):
            try:
                self._beat()
            except (DrayError, OSError) as error:
                self._notify(f"cannot renew the lock, trying on: {error}")
            if self.lost.is_set():
                return

    def _beat(self) -> None:
        began = time.time()
        found = self._storage.read_versioned(LOCK_NAME)
        if found is None:
            if began - self._heard_at > self._stale_s:
                # While we slept somebody may have taken it, changed the plan and given it back.
                self._recognise(None)
            # Deleted by hand while we live. Taken again, unless another driver was quicker.
            elif not self._released.is_set() and self._storage.create(LOCK_NAME, self._mine.to_json()):
                self._heard_at = began
            return
        holder = self._recognise(Holder.from_json(found[0]))
        if holder is None:
            return
        self.cancelled_by = holder.cancelled_by
        # Counted on from what the store has: after a lost answer our own count would give the same content, and so the
        # same version, once more, which looks like standing still.
        self._mine = replace(holder, beat=holder.beat + 1)
        if self._storage.replace(LOCK_NAME, self._mine.to_json(), found[1]):
            self._heard_at = began
        # else it changed this very moment: the next beat tells by whom

    def _recognise(self, holder: Holder | None) -> Holder | None:
        """The holder if that is us; otherwise None, and the lock is lost."""
        if holder is not None and holder.token == self._mine.token:
            return holder
        self._taker = str(holder) if holder else "somebody who removed or overwrote it"
        self.lost.set()
        return None

    def release(self) -> None:
        """Give the lock back; another's is left alone. Never raises for a store that fails: the lock goes stale."""
        self._released.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            # A beat that hangs in a failing store is harmless: its swap fails on the deleted lock.
            self._thread.join(self._mine.heartbeat_s + 5.0)
        try:
            found = self._storage.read_versioned(LOCK_NAME)
            if found is not None:
                holder = Holder.from_json(found[0])
                if holder is not None and holder.token == self._mine.token:
                    self._storage.delete(LOCK_NAME, found[1])
        except (DrayError, OSError) as error:
            self._notify(f"cannot remove the lock; others can take it in {self._stale_s:.0f} s: {error}")


def _machine() -> str:
    """Boot id and pid namespace. Two containers on one host can share name and boot id but not see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # no Linux: a dead holder is found by its heartbeat


def _process_started(pid: int) -> str:
    """Clock ticks from boot to the start of the process; empty when it has ended (zombies have).

    Field 22 of /proc/<pid>/stat: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _HIDDEN if _exists(pid) else ""
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return "" if state in "ZX" else fields[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a passwd entry
        return str(os.getuid())
