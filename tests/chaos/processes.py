"""The processes of one trial: all that descend from it, however they were started and whoever their parent was.

The trial is their subreaper (`man 2 prctl`): a process whose parent died becomes the trial's child instead of init's. So
descent alone tells a trial's processes from those of its neighbours, and nothing of it outlives the trial.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import time
from collections.abc import Collection

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWUTS = 0x04000000
#: Ray 2.60 leaves these behind when a driver is killed; they end with their raylet only where that was a service.
AGENTS = r"dashboard/agent\.py|runtime_env/agent|DashboardAgent|RuntimeEnvAgent|log_monitor\.py|monitor\.py"


def adopt_orphans() -> None:
    """Make this process the subreaper of its descendants. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def on_another_host(name: str) -> None:
    """For `preexec_fn`: give this process, and what it starts, a host name of its own. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(name)


def descendants(root: int | None = None) -> dict[int, str]:
    """Living processes below `root` (this process): pid → command line, as they call themselves now."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline()) or process.name()
    return found


def matching(pattern: str, root: int | None = None) -> list[int]:
    """Pids of descendants whose command line matches, in order."""
    return sorted(pid for pid, command in descendants(root).items() if re.search(pattern, command))


def reap(own: Collection[int]) -> None:
    """Bury the adopted orphans that have ended; `own` children are their Popen's to wait for."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def left_behind(limit_s: float, own: Collection[int]) -> list[str]:
    """What still runs below this process after `limit_s` seconds at most, Ray's own agents apart."""
    deadline = time.monotonic() + limit_s
    while True:
        reap(own)
        left = [command for command in descendants().values() if not re.search(AGENTS, command)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def end_all(own: Collection[int]) -> None:
    """Kill every descendant, until there is none."""
    for _ in range(50):
        living = descendants()
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        reap(own)
        if not living:
            return
        time.sleep(0.1)
