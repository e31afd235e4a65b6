"""Files and batches of the batch API, on one storage: whatever a client has been told of is there after a restart.

    files/file-18a9…/file.json          what it is; written last, so that a file without it was never told of
    files/file-18a9…/content.jsonl
    batches/batch_18a9…/batch.json      the record, rewritten as the batch goes on
    batches/batch_18a9…/work/…          what `dray run-batch` makes: the requests as Parquet, the job file, the output

One process writes it, under the lock of `jobs.lock`; records are read once, when it starts.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, BinaryIO, TypeVar

from jobs.batch_records import BatchRecord, FileRecord, Purpose, Status, new_id
from pipelines.storage import Storage

#: Bytes of a file that are in memory at once while it is sent.
_CHUNK = 4 << 20
#: Records that are read at once, when a server starts.
_READERS = 16
_Record = TypeVar("_Record", FileRecord, BatchRecord)


class BatchStore:
    """What clients see, each its own: an `owner` other than a record's finds nothing."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.time) -> None:
        self.storage = storage
        self._clock = clock
        # Who reads waits for nobody's storage: a batch changes under the first, and what is told of it under the second.
        self._writing, self._lock = threading.Lock(), threading.Lock()
        self._files = {one.id: one for one in self._read(FileRecord, "files", "file.json")}
        self._batches = {one.id: one for one in self._read(BatchRecord, "batches", "batch.json")}

    def _read(self, kind: type[_Record], folder: str, name: str) -> list[_Record]:
        names = [info.name for info in self.storage.list(folder)]
        records = [found for found in names if found.count("/") == 2 and found.endswith(f"/{name}")]
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(lambda found: kind.from_json(self.storage.read(found)), records))

    # ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────

    def add_file(self, owner: str, filename: str, upload: BinaryIO) -> FileRecord:
        """Keep a file; on return it is whole and will stay."""
        id_ = new_id("file-")
        with self.storage.writing(f"files/{id_}/content.jsonl") as file:
            shutil.copyfileobj(upload, file, _CHUNK)
        return self._told(id_, owner, filename, "batch")

    def adopt_file(self, owner: str, filename: str, id_: str) -> FileRecord:
        """Tell of results that were written to `content_url` of this id."""
        return self._told(id_, owner, filename, "batch_output")

    def drop_content(self, id_: str) -> None:
        """Remove what was written to `content_url` and is not told of."""
        self.storage.delete(f"files/{id_}/content.jsonl")

    def _told(self, id_: str, owner: str, filename: str, purpose: Purpose) -> FileRecord:
        record = FileRecord(
            id=id_,
            owner=owner,
            filename=filename,
            purpose=purpose,
            bytes=self.storage.info(f"files/{id_}/content.jsonl").size,
            created_at=int(self._clock()),
        )
        self.storage.write(f"files/{id_}/file.json", record.to_json())
        with self._lock:
            self._files[id_] = record
        return record

    def file(self, owner: str, id_: str) -> FileRecord | None:
        with self._lock:
            return _owned(self._files, owner, id_)

    def files(self, owner: str) -> list[FileRecord]:
        """The latest first."""
        with self._lock:
            return _newest(self._files, owner)

    def content_url(self, id_: str) -> str:
        """Where a file's bytes lie."""
        return self.storage.url(f"files/{id_}/content.jsonl")

    def content(self, record: FileRecord) -> Iterator[bytes]:
        """Its bytes, a few at a time."""
        name = f"files/{record.id}/content.jsonl"
        for start in range(0, record.bytes, _CHUNK):
            yield self.storage.read_range(name, start, min(start + _CHUNK, record.bytes))

    def delete_file(self, record: FileRecord) -> None:
        """The record goes first: a file that is told of has its content."""
        self.storage.delete(f"files/{record.id}/file.json")
        self.drop_content(record.id)
        with self._lock:
            self._files.pop(record.id, None)

    # ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add_batch(
        self,
        owner: str,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_s: float,
        metadata: dict[str, str],
    ) -> BatchRecord:
        """Queue a batch; on return it will be run, whatever ends this process."""
        now = int(self._clock())
        record = BatchRecord(
            id=new_id("batch_"),
            owner=owner,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + int(window_s),
            metadata=metadata,
        )
        with self._writing:
            return self._save(record)

    def batch(self, owner: str, id_: str) -> BatchRecord | None:
        with self._lock:
            return _owned(self._batches, owner, id_)

    def batches(self, owner: str) -> list[BatchRecord]:
        """The latest first."""
        with self._lock:
            return _newest(self._batches, owner)

    def waiting(self) -> list[BatchRecord]:
        """Of all owners, those that have not ended, in the order in which they came."""
        with self._lock:
            return sorted(
                (batch for batch in self._batches.values() if not batch.has_ended), key=lambda one: one.id
            )

    def work_url(self, id_: str) -> str:
        """The folder of a batch's own that `dray run-batch` would make."""
        return self.storage.url(f"batches/{id_}/work")

    def move(
        self, id_: str, status: Status, *, only_from: Status | None = None, **changes: Any
    ) -> BatchRecord:
        """Give a batch another status, and the time of it, on storage before anybody is told.

        A batch that has ended, or with `only_from` has another status by now, is returned as it is: that of two threads
        which are at the same batch the first one wins.
        """
        with self._writing:
            batch = self._batches[id_]
            if batch.has_ended or (only_from is not None and batch.status != only_from):
                return batch
            if status != "validating":
                changes[f"{status}_at"] = int(self._clock())
            return self._save(replace(batch, status=status, **changes))

    def count(self, id_: str, *, completed: int, failed: int) -> None:
        """How far a running batch is; not written down, the parts know it."""
        with self._writing, self._lock:
            self._batches[id_] = replace(self._batches[id_], completed=completed, failed=failed)

    def _save(self, record: BatchRecord) -> BatchRecord:
        self.storage.write(f"batches/{record.id}/batch.json", record.to_json())
        with self._lock:
            self._batches[record.id] = record
        return record


def _owned(records: dict[str, _Record], owner: str, id_: str) -> _Record | None:
    found = records.get(id_)
    return found if found is not None and found.owner == owner else None


def _newest(records: dict[str, _Record], owner: str) -> list[_Record]:
    found = [record for record in records.values() if record.owner == owner]
    return sorted(found, key=lambda record: record.id, reverse=True)
