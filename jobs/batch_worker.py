"""Runs the batches of a store one after the other, each as an ordinary job in a process of its own.

    validating ──convert──► in_progress ──dray run──► finalizing ──write_results──► completed
         └► failed              ├► failed     cancelling ──┴──► cancelled, expired: with what was answered until then
                                └► again, where the run was killed

Whatever ends this process or the run, the batch is taken up where it stands: a run resumes.
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

from jobs.batch_records import BatchRecord, Mistake, Status
from jobs.batch_run import DrayRun, Run
from jobs.batch_store import BatchStore
from jobs.books import fold
from jobs.inspect import opened
from jobs.openai_batch import JOB, Batch, convert
from jobs.openai_body import BatchMistakes, LineMistake
from jobs.openai_job import OUT, REQUESTS, as_yaml
from jobs.openai_results import Unanswered, write_results
from jobs.served_models import ServedModel
from pipelines.errors import Interrupted, SpecError, StorageError, StorageFull, TransientStorageError
from pipelines.storage import Storage, locate

#: Seconds between two looks at the queue and at a run.
_TICK_S = 0.2
#: Seconds between two counts of a run's rows, or so many times what the last one took: it reads each part's footer.
_COUNT_S, _COUNT_SHARE = 3.0, 20
#: Seconds until a store that failed us is asked again.
_RETRY_S = 5.0
#: So often a run that somebody killed is started again, by one server.
_MOST_RESTARTS = 5
#: What is the store's fault, and no batch's.
_STORE = (StorageError, StorageFull, TransientStorageError)
_READ_BYTES = 1 << 20
_log = logging.getLogger("dray")

_WHY_UNANSWERED = {
    "expired": "This request was not answered within the completion window.",
    "cancelled": "The batch was cancelled before this request was answered.",
    "failed": "The batch failed before this request was answered.",
}


class BatchWorker:
    """For one store, in one thread."""

    def __init__(
        self,
        store: BatchStore,
        models: Mapping[str, ServedModel],
        *,
        start: Callable[[bytes], Run] = DrayRun,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`models`: by the name that requests call them. `start`: begins a run of a job file with this content."""
        self.store = store
        self.models = models
        self.current: str | None = None
        """The batch that is at work."""
        self._start, self._clock = start, clock
        self._stopping = threading.Event()
        self._restarts: Counter[str] = Counter()

    def stop(self) -> None:
        """Have `run` return; the run that goes on is ended as by SIGTERM, and its batch taken up by the next worker."""
        self._stopping.set()

    def run(self, check: Callable[[], None] = lambda: None) -> None:
        """Until `stop`. `check` raises when the store is somebody else's by now."""
        while not self._stopping.is_set():
            check()
            try:
                self._expire_queued()
                waiting = self.store.waiting()
                if waiting:
                    self._handle(waiting[0])
                else:
                    self._stopping.wait(_TICK_S)
            except _STORE as error:  # full, away, or refusing us: mended from outside
                _log.error("batches wait for their store: %s", error)
                self._stopping.wait(_RETRY_S)

    def _handle(self, batch: BatchRecord) -> None:
        self.current = batch.id
        try:
            self._advance(batch)
        except _STORE:
            raise
        except Exception:  # noqa: BLE001 -- one batch that cannot be is no reason to end the others
            _log.exception("batch %s", batch.id)
            self._fail(batch, self._ours(batch, "internal_error"))
        finally:
            self.current = None

    def _advance(self, batch: BatchRecord) -> None:
        """As far as it goes: to the end of the batch, or until `stop`."""
        if batch.status == "validating":
            batch = self._validate(batch)
        if batch.status in ("in_progress", "cancelling"):
            batch = self._answer(batch)
        if batch.status == "finalizing":
            self._write(batch, "completed")

    # ── Before ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _expire_queued(self) -> None:
        """Those whose window is over before their turn has come."""
        for batch in self.store.waiting():
            if batch.status == "validating" and self._clock() > batch.expires_at:
                self.store.move(batch.id, "expired", only_from="validating")

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
            self._keep_job(batch, converted)
        except BatchMistakes as error:
            return self._fail(batch, *map(_mistake_of, error.mistakes))
        except SpecError as error:
            message = str(error).replace(url, "the file").replace(self.store.storage.root, "…")
            return self._fail(batch, Mistake(code="invalid_request", message=message))
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

    def _keep_job(self, batch: BatchRecord, converted: Batch) -> None:
        """With what it extends written out: the served job file may be another one when a next server goes on."""
        whole = as_yaml(converted.load().raw)
        Storage(self.store.work_url(batch.id)).write(JOB, whole.encode())

    # ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, batch: BatchRecord) -> BatchRecord:
        """Run the job, unless it was cancelled before."""
        code, why = Interrupted.exit_code, ""
        if batch.status == "in_progress" and self._clock() <= batch.expires_at:
            run = self._start(Storage(self.store.work_url(batch.id)).read(JOB))
            try:
                self._look_after(batch, run)
            finally:
                run.end()
                code, why = run.result()
        if code == 0:
            batch = self.store.move(batch.id, "finalizing", only_from="in_progress")
        else:
            batch = self.store.batch(batch.owner, batch.id) or batch
        if batch.status == "cancelling":
            return self._write(batch, "cancelled")
        if code == 0:
            return batch
        if self._clock() > batch.expires_at:
            return self._write(batch, "expired")
        if self._stopping.is_set():
            return batch
        _log.error("batch %s: its run ended with exit code %d: %s", batch.id, code, why)
        if (code < 0 or code == Interrupted.exit_code) and self._restarts[batch.id] < _MOST_RESTARTS:
            self._restarts[batch.id] += 1
            return batch
        return self._write(batch, "failed", errors=[asdict(self._ours(batch, "batch_failed"))])

    def _look_after(self, batch: BatchRecord, run: Run) -> None:
        """Until it has ended; it is asked to when the batch is cancelled or expired, or this worker is to stop."""
        count_at = 0.0
        while run.is_on():
            now = self.store.batch(batch.owner, batch.id)
            expired = self._clock() > batch.expires_at
            if self._stopping.is_set() or expired or (now is not None and now.status == "cancelling"):
                run.end()
            elif time.monotonic() > count_at:
                began = time.monotonic()
                self._count(batch)
                self._expire_queued()
                took = time.monotonic() - began
                count_at = began + max(_COUNT_S, _COUNT_SHARE * took)
            time.sleep(_TICK_S)

    def _count(self, batch: BatchRecord) -> None:
        """How far it is, if that can be seen now."""
        try:
            storage = Storage(f"{self.store.work_url(batch.id)}/{OUT}")
            totals = fold(storage, opened(storage)[1]).totals
        except Exception as error:  # noqa: BLE001 -- the run goes on without
            _log.debug("batch %s: not counted: %s", batch.id, error)
            return
        self.store.count(batch.id, completed=totals.rows_ok, failed=totals.rows_failed)

    # ── The end ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, batch: BatchRecord, status: Status, **changes: Any) -> BatchRecord:
        """The results as files, then the batch's end. Whoever comes here twice writes the same two files again."""
        good, bad = (f"file-{batch.id.removeprefix('batch_')}{kind}" for kind in ("o", "e"))
        work, why = self.store.work_url(batch.id), _WHY_UNANSWERED.get(status)
        unanswered = why and Unanswered(requests=f"{work}/{REQUESTS}", code=f"batch_{status}", message=why)
        counts = write_results(
            f"{work}/{OUT}",
            self.store.content_url(good),
            self.store.content_url(bad),
            endpoint=batch.endpoint,
            encoding_format=batch.encoding_format,
            model=batch.model,
            unanswered=unanswered or None,
        )
        for kind, id_, written in (("output", good, counts.completed), ("error", bad, counts.failed)):
            if written:
                self.store.adopt_file(batch.owner, f"{batch.id}_{kind}.jsonl", id_)
            else:
                self.store.drop_file(id_)
            changes[f"{kind}_file_id"] = id_ if written else None
        return self.store.move(batch.id, status, completed=counts.completed, failed=counts.failed, **changes)

    def _fail(self, batch: BatchRecord, *mistakes: Mistake) -> BatchRecord:
        return self.store.move(batch.id, "failed", errors=[asdict(mistake) for mistake in mistakes])

    def _ours(self, batch: BatchRecord, code: str) -> Mistake:
        """What a client is told of what is no mistake of its own: no paths, no settings."""
        return Mistake(code=code, message=f"The server could not run {batch.id}; its log says why.")


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


def _mistake_of(mistake: LineMistake) -> Mistake:
    who = "" if mistake.custom_id is None else f"custom_id {mistake.custom_id!r}: "
    about = f"{mistake.key}: " if mistake.key else ""
    return Mistake(
        code="invalid_request",
        message=f"{who}{about}{mistake.text}",
        line=mistake.line,
        param=mistake.key or None,
    )
