"""`pipelines.orphans` with real processes: an owner, what it started, and a SIGKILL."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.local.runs import ROOT

_OWNER = """
import os, subprocess, sys, time
from pipelines.orphans import end_with_this_process
end_with_this_process()
sleep = "import time; time.sleep(60)"
child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', %r]).pid, flush=True); %s" % (sleep, sleep)
forked = os.fork()  # as vLLM may start its engine
if not forked:
    time.sleep(60)
print(forked, flush=True)
started = subprocess.Popen([sys.executable, "-c", child])
print(started.pid, flush=True)
time.sleep(60)
"""

_PARENT = """
import subprocess, sys, time
stuck = "import signal, time; from pipelines.orphans import end_with_parent; end_with_parent(); print('ready', flush=True);"
stuck += "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stuck], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_all_descendants_end_with_an_owner_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        family = [int(owner.stdout.readline()) for _ in range(3)]
        children = [process.pid for process in psutil.Process(owner.pid).children()]
        (guard,) = set(children) - set(family)
        family.append(guard)
        time.sleep(1.2)  # two looks of the guard
        assert all(map(_alive, family))
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + 10
        while any(map(_alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in family if _alive(pid)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_process_that_no_longer_answers_ends_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while _alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(child)
