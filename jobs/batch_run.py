"""The run of a batch's job: `dray run`, as a process of its own, so that neither takes the other along."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Protocol

from jobs.child import start_dray
from jobs.openai_batch import JOB

#: Of what a run that failed wrote to stderr, so much is kept for the log.
_TAIL_BYTES = 2000


class Run(Protocol):
    """A run of a batch's job."""

    def is_on(self) -> bool:
        """Whether it has not ended."""

    def end(self) -> None:
        """As SIGTERM would; once."""

    def result(self) -> tuple[int, str]:
        """(exit code of `dray run`, negative for a signal; what an error said). Waits for its end."""


class DrayRun:
    """`dray run` of a job file with this content."""

    def __init__(self, job: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dray-batch-")
        job_file = os.path.join(self._folder.name, JOB)
        Path(job_file).write_bytes(job)
        self._stdout, self._stderr = (Path(self._folder.name, name) for name in ("stdout", "stderr"))
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = start_dray(["run", "--json", job_file], stdout=stdout, stderr=stderr)
        self._asked = False

    def is_on(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def result(self) -> tuple[int, str]:
        code = self._process.wait()
        document, words = self._stdout.read_bytes(), self._stderr.read_bytes()[-_TAIL_BYTES:]
        self._folder.cleanup()
        try:
            return code, str(json.loads(document)["message"])
        except (ValueError, LookupError, TypeError):
            return code, words.decode("utf-8", "replace").strip()
