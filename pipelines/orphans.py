"""Nobody outlives who started it: an actor its raylet, what an actor started the actor, whatever ended them.

vLLM's EngineCore does not look after its parent. Ray's raylet kills the children of an actor that dies; where the raylet
dies as well (a killed node agent, the kernel's OOM killer), an EngineCore would keep its GPU's memory for ever. And a Ray
worker whose raylet is gone ends itself, but not always: a few stood still on their way out for more than an hour.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1

#: Not a thread, which would die with its process; no imports but the interpreter's own: 20 ms of CPU, 9 MB.
_GUARD = """
import os, signal, sys, time
owner = int(sys.argv[1])
while os.getppid() == owner:
    time.sleep(0.5)
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
    """Have all that this process starts from now on killed within a second of its end. Only for a process of our own.

    It becomes the leader of a process group, which its descendants belong to, and a guard outside of the group waits
    for its end.
    """
    with contextlib.suppress(PermissionError):  # the leader of a session, and so of a group, already
        os.setpgid(0, 0)
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
