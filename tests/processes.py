"""What still runs of the processes that a test has seen start."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def still_runs(process: psutil.Process) -> bool:
    """Whether it has not ended. One that nobody has waited for has, though psutil calls it running: an orphan stays a zombie
    for good where the machine's first process does not look after such, as in many a container."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_at_work(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of a run's that may hold a shard or a GPU and still run: raylets, our stages' actors, engines.

    What Ray itself leaves behind (2.60) holds nothing: its agents, and actors of its own that stand still on their way out.
    """
    found = []
    for process in filter(still_runs, processes):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # may end while it is looked at
            if process.name().startswith(("raylet", "ray::MapWorker", "VLLM::")):
                found.append(process)
    return found


def end_all(processes: Iterable[psutil.Process]) -> None:
    """Kill what is left of them."""
    for process in filter(still_runs, processes):
        with suppress(psutil.NoSuchProcess):
            process.kill()
