"""What still runs of the processes that a test has seen start."""

from __future__ import annotations

import psutil


def still_runs(process: psutil.Process) -> bool:
    """Whether it has not ended. One that nobody has waited for has, though psutil calls it running: an orphan stays a zombie
    for good where the machine's first process does not look after such, as in many a container."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
