"""Imports tried out in processes of their own: they take seconds, and a broken build may crash the one that asks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

#: Prints one line of JSON. `init` says why a CUDA build sees no GPU, which `is_available` swallows.
TORCH = """
import json, torch
fault = ""
if torch.version.cuda and not torch.cuda.is_available():
    try:
        torch.cuda.init()
    except Exception as error:
        fault = str(error)
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "hip": torch.version.hip,
    "available": torch.cuda.is_available(),
    "devices": torch.cuda.device_count(),
    "architectures": torch.cuda.get_arch_list(),
    "fault": fault,
}))
"""
VLLM = "import vllm; print(vllm.__version__)"
RAY = "import ray; print(ray.__version__)"

_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
}
_ERROR = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")


@dataclass(frozen=True, slots=True)
class Tried:
    """How an import went."""

    output: str
    """The last line of its standard output."""
    fault: str
    """Empty, or the error in one line."""

    @property
    def ok(self) -> bool:
        return not self.fault


class Probe:
    """A Python process that tries an import. Starts at once; `result` waits for it."""

    def __init__(self, code: str) -> None:
        # files, not pipes: nobody reads while it runs
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        # -P: a torch.py in the user's folder is not what Ray's workers will import
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env={**os.environ, **_QUIET},
            start_new_session=True,
        )

    def result(self, limit_s: float) -> Tried:
        """Wait, at most `limit_s` from now."""
        try:
            status: int | None = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        return tried(status, _text(self._out), _text(self._err), limit_s)

    def close(self) -> None:
        """End the process, if it still runs, and its children."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()
        self._err.close()


def tried(status: int | None, output: str, errors: str, limit_s: float) -> Tried:
    """What an exit status (None: still running) and two streams say."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if status == 0:
        return Tried(last, "")
    if status is None:
        return Tried(last, f"not imported within {limit_s:g} s")
    if status < 0:
        names = {int(number): number.name for number in signal.Signals}
        return Tried(last, f"crashed with {names.get(-status, f'signal {-status}')}")
    return Tried(last, error_line(errors) or f"exit status {status}")


def error_line(text: str) -> str:
    """The line of a traceback that names the error, without the advice that some libraries print below it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return (named or lines or [""])[-1][:400]


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
