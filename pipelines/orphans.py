"""Nobody outlives who started it: an actor its raylet, what an actor started the actor, whatever ended them.

vLLM's EngineCore does not look after its parent, and the ranks of a tensor-parallel engine outlive an EngineCore that was
killed by ten seconds and more, with their GPUs' memory. Ray's raylet kills the children of an actor that ends, not what these
have started; where the raylet dies as well (a killed node agent, the kernel's OOM killer), an EngineCore would keep its GPU's
memory for ever. And a Ray worker whose raylet is gone ends itself, but not always: a few stood still on their way out for
more than an hour.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37

_log = logging.getLogger(__name__)

#: Seconds that `outlived` waits.
GONE_S = 30.0

#: Not a thread, which would die with its process; nobody's child, as a raylet kills the children of an actor that ends;
#: no imports but the interpreter's own: 20 ms of CPU, 9 MB.
_GUARD = """
import os, select, signal, sys, time
owner = int(sys.argv[1])
try:
    end = os.pidfd_open(owner)
except (AttributeError, OSError):  # not Linux, or an old one
    end = None
if os.fork():
    os._exit(0)
if end is not None:
    select.select([end], [], [])
else:
    try:
        while True:
            os.kill(owner, 0)
            time.sleep(0.5)
    except ProcessLookupError:
        pass
try:
    os.killpg(owner, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends. Linux only; elsewhere nothing happens.

    The signal comes when the parent's *thread* ends that forked (prctl(2)); raylets start workers on their main thread.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # ended just before
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_this_process() -> None:
    """Have all that this process starts from now on killed when it ends. Only for a process of our own.

    It becomes the leader of a process group, which its descendants belong to, and a guard outside of the group waits
    for its end.
    """
    with contextlib.suppress(PermissionError):  # the leader of a session, and so of a group, already
        os.setpgid(0, 0)
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """At the end, wait until workers and engines that were started within are gone, and with them what they held of a GPU.

    Nobody is killed here: that is for the raylet, the kernel and the guards. On Linux a descendant whose own parent ended is
    this process's child meanwhile, so that it can be waited for; elsewhere it is not. Processes of this process's own
    group are not waited for: Ray's servers, which hold nothing, and what a notebook may have started.
    """
    before = _descendants()
    with _adopting():
        try:
            yield
        finally:
            _, left = psutil.wait_procs(_descendants() - before, timeout=GONE_S)
            if left:
                pids = ", ".join(str(process.pid) for process in left)
                _log.warning(
                    "still there after %.0f s, with what they hold of a GPU: processes %s", GONE_S, pids
                )


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Orphans among the descendants become this process's children; on Linux."""
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, was = ctypes.CDLL(None), ctypes.c_int(0)
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was))
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, was.value)


def _descendants() -> set[psutil.Process]:
    """Of this process, but those of its own process group."""
    group, found = os.getpgrp(), set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) != group:
                found.add(process)
    return found
