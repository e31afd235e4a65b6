"""A driver: one `dray run` as a user starts it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.local.runs import ROOT


class Driver:
    """One `dray run` as a subprocess, with what it says in a file."""

    def __init__(self, command: Sequence[str], log: Path, **popen: Any) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **popen
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_words(self) -> str:
        """Its error, or the last line that it wrote."""
        lines = self.words.splitlines()
        lines = [line for line in lines if line.startswith("error")] or lines
        return lines[-1][:400] if lines else "(no words)"
