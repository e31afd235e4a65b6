"""Runs the batches of a store one after the other, each as an ordinary job in a process of its own.

    validating ──convert──► in_progress ──dray run──► finalizing ──write_results──► completed
         └► failed              └► failed      cancelling ──┴──► cancelled, expired: with what was answered until then

Whatever ends this process or the run, the batch is taken up where it stands when the worker starts again: a run resumes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from jobs.batch_records import BatchRecord, Mistake
from jobs.batch_store import BatchStore
from jobs.books import fold
from jobs.child import start_dray
from jobs.inspect import opened
from jobs.openai_batch import JOB, convert
from jobs.openai_body import BatchMistakes
from jobs.openai_body import Mistake as LineMistake
from jobs.openai_job import OUT, REQUESTS
from jobs.openai_results import Unanswered, write_results
from jobs.served_models import ServedModel
from pipelines.errors import DrayError, Interrupted, OutputError, TransientStorageError
from pipelines.storage import Storage, locate

#: Seconds between two looks at the queue and at a run; between two counts of a run's rows.
_TICK_S, _COUNT_S = 0.2, 3.0
#: Seconds until a store that did not answer is asked again.
_RETRY_S = 5.0
_READ_BYTES = 1 << 20
_log = logging.getLogger("dray")

_WHY_UNANSWERED = {
    "expired": "This request was not answered within the completion window.",
    "cancelled": "The batch was cancelled before this request was answered.",
}


class Run(Protocol):
    """A run of a batch's job."""

    def is_on(self) -> bool:
        """Whether it has not ended."""

    def end(self) -> None:
        """As Ctrl-C would; once."""

    def result(self) -> tuple[int, str]:
        """(exit code of `dray run`, what an error said); waits for its end."""


class BatchWorker:
    """For one store, in one thread."""

    def __init__(
        self,
        store: BatchStore,
        models: Mapping[str, ServedModel],
        *,
        start: Callable[[bytes], Run] = lambda job: DrayRun(job),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`models`: by the name that requests call them. `start`: begins a run of a job file with this content."""
        self.store = store
        self.models = models
        self.current: str | None = None
        """The batch that is at work."""
        self._start, self._clock = start, clock
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Have `run` return; the run that goes on is ended as by SIGTERM, and its batch taken up by the next worker."""
        self._stopping.set()

    def run(self, check: Callable[[], None] = lambda: None) -> None:
        """Until `stop`. `check` raises when the store is somebody else's by now."""
        while not self._stopping.is_set():
            check()
            waiting = self.store.waiting()
            if not waiting:
                self._stopping.wait(_TICK_S)
                continue
            self.current = waiting[0].id
            try:
                self._advance(waiting[0])
            except TransientStorageError as error:
                _log.warning("batch %s: %s; trying again", self.current, error)
                self._stopping.wait(_RETRY_S)
            except DrayError as error:
                self._fail(waiting[0], Mistake(code="batch_failed", message=str(error)))
            except Exception as error:  # noqa: BLE001 -- one batch that cannot be is no reason to end the others
                _log.exception("batch %s", self.current)
                self._fail(
                    waiting[0], Mistake(code="internal_error", message=f"{type(error).__name__}: {error}")
                )
            finally:
                self.current = None

    def _advance(self, batch: BatchRecord) -> None:
        """As far as it goes: to the end of the batch, or until `stop`."""
        if batch.status == "validating":
            if self._clock() > batch.expires_at:
                self.store.move(batch.id, "expired")
                return
            batch = self._validate(batch)
        if batch.status in ("in_progress", "cancelling"):
            batch = self._answer(batch)
        if batch.status == "finalizing":
            self._write(batch, "completed")

    def _validate(self, batch: BatchRecord) -> BatchRecord:
        """Check the whole file, and make its job; nothing has been asked until then."""
        url = self.store.content_url(batch.input_file_id)
        name = asked_model(url) or (next(iter(self.models)) if len(self.models) == 1 else None)
        served = self.models.get(name or "")
        if served is None:
            message = f"body.model is {name!r}; served are {', '.join(self.models)}"
            return self._fail(batch, Mistake(code="model_not_found", message=message, param="body.model"))
        try:
            converted = convert(
                url, self.store.work_url(batch.id), extends=served.job_file, overrides=served.overrides
            )
        except BatchMistakes as error:
            return self._fail(batch, *map(_told, error.mistakes))
        if converted.endpoint != batch.endpoint:
            message = f"the lines' url is {converted.endpoint}, the batch's endpoint {batch.endpoint}"
            return self._fail(batch, Mistake(code="mismatched_endpoint", message=message, param="url"))
        return self.store.move(
            batch.id,
            "in_progress",
            only_from="validating",
            model=served.name,
            encoding_format=converted.encoding_format,
            total=converted.requests,
        )

    def _answer(self, batch: BatchRecord) -> BatchRecord:
        """Run the job, unless it was cancelled before it began."""
        work = Storage(self.store.work_url(batch.id))
        run = self._start(work.read(JOB)) if batch.status == "in_progress" else None
        counted = 0.0
        while run is not None and run.is_on():
            now = self.store.batch(batch.owner, batch.id)
            expired = self._clock() > batch.expires_at
            if self._stopping.is_set() or expired or (now is not None and now.status == "cancelling"):
                run.end()
            elif time.monotonic() - counted > _COUNT_S:
                counted = time.monotonic()
                self._count(batch)
            time.sleep(_TICK_S)
        code, why = (Interrupted.exit_code, "") if run is None else run.result()
        batch = self.store.batch(batch.owner, batch.id) or batch
        if batch.status == "cancelling":
            return self._write(batch, "cancelled")
        if code == 0:
            return self.store.move(batch.id, "finalizing")
        if self._clock() > batch.expires_at:
            return self._write(batch, "expired")
        if self._stopping.is_set():
            return batch
        return self._fail(
            batch, Mistake(code="batch_failed", message=why or f"the run ended with exit code {code}")
        )

    def _write(self, batch: BatchRecord, status: Any) -> BatchRecord:
        """The results as files, then the batch's end. Whoever comes here twice writes the same two files again."""
        good, bad = (f"file-{batch.id.removeprefix('batch_')}{kind}" for kind in ("o", "e"))
        work = self.store.work_url(batch.id)
        why = _WHY_UNANSWERED.get(status)
        counts = write_results(
            f"{work}/{OUT}",
            self.store.content_url(good),
            self.store.content_url(bad),
            endpoint=batch.endpoint,
            encoding_format=batch.encoding_format,
            model=batch.model,
            unanswered=None
            if why is None
            else Unanswered(requests=f"{work}/{REQUESTS}", code=f"batch_{status}", message=why),
        )
        told = {"output": (good, counts.completed), "error": (bad, counts.failed)}
        files: dict[str, Any] = {}
        for kind, (id_, requests) in told.items():
            files[f"{kind}_file_id"] = id_ if requests else None
            if requests:
                self.store.adopt_file(batch.owner, f"{batch.id}_{kind}.jsonl", id_)
            else:
                self.store.drop_content(id_)
        return self.store.move(batch.id, status, completed=counts.completed, failed=counts.failed, **files)

    def _count(self, batch: BatchRecord) -> None:
        try:
            storage = Storage(f"{self.store.work_url(batch.id)}/{OUT}")
            totals = fold(storage, opened(storage)[1]).totals
        except OutputError:
            return  # its plan is not there yet
        self.store.count(batch.id, completed=totals.rows_ok, failed=totals.rows_failed)

    def _fail(self, batch: BatchRecord, *mistakes: Mistake) -> BatchRecord:
        return self.store.move(batch.id, "failed", errors=[asdict(mistake) for mistake in mistakes])


def asked_model(url: str) -> str | None:
    """What the first request of a batch file calls the model; None where that cannot be read, which `convert` will say."""
    storage, name = locate(url)
    with io.BufferedReader(cast(io.RawIOBase, storage.open_input(name)), _READ_BYTES) as file:
        for line in file:
            if line.strip():
                try:
                    model = json.loads(line)["body"]["model"]
                except (ValueError, LookupError, TypeError, RecursionError):
                    return None
                return model if isinstance(model, str) else None
    return None


def _told(mistake: LineMistake) -> Mistake:
    who = "" if mistake.custom_id is None else f"custom_id {mistake.custom_id!r}: "
    about = f"{mistake.key}: " if mistake.key else ""
    return Mistake(
        code="invalid_request",
        message=f"{who}{about}{mistake.text}",
        line=mistake.line,
        param=mistake.key or None,
    )


class DrayRun:
    """`dray run` of a job file, as a process of its own."""

    def __init__(self, job: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dray-batch-")
        job_file = os.path.join(self._folder.name, JOB)
        Path(job_file).write_bytes(job)
        self._told = Path(self._folder.name, "told.json")
        with self._told.open("wb") as told:
            self._process = start_dray(["run", "--json", job_file], stdout=told, stderr=subprocess.DEVNULL)
        self._asked = False

    def is_on(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def result(self) -> tuple[int, str]:
        code = self._process.wait()
        told = self._told.read_bytes()
        self._folder.cleanup()
        try:
            return code, str(json.loads(told).get("message", ""))
        except ValueError:
            return code, ""
