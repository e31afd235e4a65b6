"""Run one command as a process of its own and watch it from outside: time, memory, CPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.machine import ROOT

#: Seconds that a command has to end when it is stopped.
END_S = 15.0
#: Seconds between two looks at the process, and at all that it started.
OWN_EVERY_S, TREE_EVERY_S = 0.1, 1.0


class ChildFailed(Exception):
    """The command ended with another exit code than 0; the message has the end of its log."""


@dataclass
class Watched:
    """What was seen of a command that succeeded."""

    began_at: float
    """Unix time just before it was started."""
    ended_at: float
    wall_s: float
    peak_rss: int = 0
    """Bytes; of the process itself, without those that it started."""
    cpu_s: float = 0.0
    """Of the process itself, user and system."""
    tree_cpu_s: dict[str, float] = field(default_factory=dict)
    """Of the process and all that it started, by their titles; seen once a second, so a short-lived one may be missing."""
    processes: dict[str, int] = field(default_factory=dict)
    """How many processes had each of these titles."""
    largest_descendant_rss: int = 0
    """Bytes, of the largest process that it started, seen once a second."""
    rss_curve: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, bytes) of the process itself, once a second."""


class OutOfTime(Exception):
    """The command was stopped at the deadline."""


def dray(*arguments: str) -> list[str]:
    """The `dray` command of this checkout, also where it is not installed."""
    return [sys.executable, "-m", "jobs.cli", *arguments]


def run(
    command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path, deadline: float | None = None
) -> Watched:
    """Run `command` to its end, its output in `log`; `deadline` by `time.monotonic`. Raises ChildFailed, OutOfTime."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began_at, began = time.time(), time.monotonic()
    watched = Watched(began_at=began_at, ended_at=began_at, wall_s=0.0)
    tree_cpu: dict[int, tuple[str, float]] = {}
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env), cwd=cwd
        )
        process, next_tree = psutil.Process(child.pid), 0.0
        try:
            while child.poll() is None:
                with contextlib.suppress(psutil.Error):
                    watched.peak_rss = max(watched.peak_rss, _rss(process))
                    watched.cpu_s = _cpu(process)
                    if time.monotonic() >= next_tree:
                        next_tree = time.monotonic() + TREE_EVERY_S
                        watched.rss_curve.append((round(time.monotonic() - began, 1), _rss(process)))
                        _look_at_descendants(process, watched, tree_cpu)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(OWN_EVERY_S)
                if deadline is not None and time.monotonic() > deadline:
                    raise OutOfTime(f"stopped after {time.monotonic() - began:.0f} s: the time was used up")
        except BaseException:
            _end(process)
            child.wait()
            raise
    watched.wall_s = time.monotonic() - began
    watched.ended_at = time.time()
    for title, seconds in (("the command itself", watched.cpu_s), *tree_cpu.values()):
        watched.tree_cpu_s[title] = watched.tree_cpu_s.get(title, 0.0) + seconds
        watched.processes[title] = watched.processes.get(title, 0) + 1
    if child.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise ChildFailed(f"exit code {child.returncode}: {' '.join(command)}\n{tail}")
    return watched


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without other people's servers: no hub, no statistics, quiet logs."""
    quiet = {
        # The Dray of this checkout, wherever the environment's own is installed from.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **quiet, **extra}


def _end(process: psutil.Process) -> None:
    """Ask the command to end (dray ends its Ray, a bare script's engine follows it), then all that it left behind."""
    with contextlib.suppress(psutil.Error):
        family = process.children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs([process, *family], timeout=END_S)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()


def _rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _look_at_descendants(
    process: psutil.Process, watched: Watched, cpu: dict[int, tuple[str, float]]
) -> None:
    for descendant in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            watched.largest_descendant_rss = max(watched.largest_descendant_rss, _rss(descendant))
            spent, title = _cpu(descendant), _title(descendant)
            # Between two tasks a Ray worker is idle; what it was before says more.
            if title == "ray::IDLE" and descendant.pid in cpu:
                title = cpu[descendant.pid][0]
            cpu[descendant.pid] = title, spent


def _title(process: psutil.Process) -> str:
    """`ray::MapBatches(_prepare)`, `VLLM::EngineCore`, `raylet`, `python dashboard.py`."""
    words = process.cmdline() or [process.name()]
    script = next((word for word in words[1:] if word.endswith(".py")), "") if "python" in words[0] else ""
    return " ".join(Path(word).name if word.startswith("/") else word for word in (words[0], script)).strip()[
        :60
    ]
