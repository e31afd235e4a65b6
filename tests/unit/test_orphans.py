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


def _gone(pids: list[int], within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(_alive, pids))


def _guards(owner: int) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:4] == ["-I", "-S", "-c"]
        and process.info["cmdline"][-1] == str(owner)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["the kernel", "a raylet"])
def test_all_descendants_end_with_an_owner_that_is_killed(by: str) -> None:
    """A raylet kills the children of its actor, and would kill a guard among them; not those that they have started."""
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        family = [int(owner.stdout.readline()) for _ in range(3)]
        guards = _guards(owner.pid)
        assert len(guards) == 1
        time.sleep(0.5)
        assert all(map(_alive, family + guards))
        children = psutil.Process(owner.pid).children() if by == "a raylet" else []
        owner.kill()
        for child in children:
            child.kill()
        owner.wait()
        assert _gone(family + guards), f"{family} and {guards}"


_RUN = """
import subprocess, sys
from pipelines.orphans import outlived
orphan = "import sys; sys.stdin.read()"  # until the test lets it go
child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', %r]).pid, flush=True)" % orphan
with outlived():
    subprocess.run([sys.executable, "-c", child], start_new_session=True)
    print("the work is done", flush=True)
print("all are gone", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has a child subreaper")
def test_a_run_ends_after_the_last_process_that_it_started() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _RUN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdin
        assert run.stdout
        orphan = int(run.stdout.readline())
        assert run.stdout.readline() == "the work is done\n"
        time.sleep(1)
        assert run.poll() is None
        assert _alive(orphan)
        run.stdin.close()
        assert run.stdout.readline() == "all are gone\n"
        assert not _alive(orphan)


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
        assert _gone([child])
