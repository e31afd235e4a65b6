"""An output as a dataset to hand on: its good records in files of a wanted size, split by a stable hash.

    parts in plan order ─► good records ─► split ─► files of about `file_bytes` ─► the target folder

Same output, same files to the byte: records stand in the order of the plan, shard by shard. A local target appears as a
whole; elsewhere `_SUCCESS` is written last. One part's row group is in memory, and one file per split.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.books import SUCCESS, Books
from pipelines.errors import OutputError, SpecError
from pipelines.part import raise_if_damaged
from pipelines.place import input_rows
from pipelines.storage import Storage


class Sink(Protocol):
    """One file in the making, in memory."""

    @property
    def size(self) -> int:
        """Bytes so far."""

    def write(self, records: pa.Table) -> None: ...

    def close(self) -> bytes:
        """The finished file."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which split a record belongs to: by a hash of its row, so that new rows move none of the old ones."""

    shares: Mapping[str, float]
    """Split → share of the rows; they add up to 1."""
    by: str = "row_id"
    """The column that is hashed: rows of one value stay together; of `row_id` the elements of one row of the input."""

    @classmethod
    def of(cls, given: Sequence[str], by: str | None = None) -> Splits:
        """From `train=0.9` and so on; all of it is `train` where nothing is given. Raises SpecError."""
        shares: dict[str, float] = {}
        for text in given or ["train=1"]:
            name, _, share = text.partition("=")
            try:
                shares[name] = float(share)
            except ValueError:
                raise SpecError(f"--split {text}: write it as train=0.9") from None
            if not name.isidentifier() or not 0 < shares[name] <= 1:
                raise SpecError(f"--split {text}: a split has a name of letters and a share above 0 up to 1")
        if len(shares) < len(given) or abs(sum(shares.values()) - 1) > 1e-9:
            raise SpecError(
                f"--split: the shares of {', '.join(shares)} add up to {sum(shares.values()):g}, not to 1"
            )
        return cls(shares=shares, by=by or "row_id")

    def numbers(self, values: Iterable[str | None]) -> np.ndarray[Any, Any]:
        """The number of each value's split, in the order of `shares`."""
        digests = [hashlib.blake2b(repr(value).encode(), digest_size=8).digest() for value in values]
        places = np.frombuffer(b"".join(digests), ">u8").astype(np.float64) / 2.0**64
        bounds = np.cumsum(list(self.shares.values()))[:-1]
        return np.searchsorted(bounds, places, side="right")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    to: str
    files: dict[str, list[str]]
    """Split → its files."""
    records: dict[str, int]
    """Split → its records."""
    left_out: int
    """Records that failed, or that the format cannot hold."""


def export_dataset(
    storage: Storage,
    books: Books,
    to: str,
    *,
    suffix: str,
    sink: Callable[[pa.Schema], Sink],
    prepare: Callable[[pa.Table], pa.Table],
    splits: Splits,
    file_bytes: int,
    card: Callable[[Exported], str] | None = None,
    partial: bool = False,
) -> Exported:
    """Write the good records of an output to the folder `to` (local or any fsspec URL), which must be empty.

    `prepare`: makes a table of good records what is written of them, row by row, perhaps fewer. `card`: the README.md.
    Raises OutputError for an output that is not finished (unless `partial`), a target that holds something, and a
    split by a column that is not there.
    """
    if not partial and not (storage.exists(SUCCESS) and books.complete):
        raise OutputError(
            f"{storage.url()} is not finished: `dray resume` it, or export what is there with --partial"
        )
    columns = books.parts[0].schema.names if books.parts else [splits.by]
    if splits.by not in columns:
        raise OutputError(f"--split-by: the output has no column {splits.by!r}; it has {', '.join(columns)}")
    with _published(to) as target:
        writers = {name: _Rolling(target, f"data/{name}", suffix, sink, file_bytes) for name in splits.shares}
        # Those that stand in parts of their own, with `failed_rows: separate`.
        left_out = sum(part.footer.stats.rows_failed for part in books.parts if part.footer.errors_object)
        for table in _records(storage, books):
            good = table.filter(pc.is_null(table["error_code"]))
            by = good[splits.by]
            numbers = splits.numbers(_texts(input_rows(by) if splits.by == "row_id" else by))
            for number, writer in enumerate(writers.values()):
                mine = good.filter(pa.array(numbers == number))
                ready = prepare(mine)
                left_out += len(mine) - len(ready)
                writer.write(ready)
            left_out += len(table) - len(good)
        for writer in writers.values():
            writer.close()
        exported = Exported(
            to=to,
            files={name: writer.files for name, writer in writers.items()},
            records={name: writer.records for name, writer in writers.items()},
            left_out=left_out,
        )
        if card is not None:
            target.write("README.md", card(exported).encode())
    return exported


class _Rolling:
    """The files of one split, one after the other."""

    def __init__(
        self, target: Storage, stem: str, suffix: str, sink: Callable[[pa.Schema], Sink], file_bytes: int
    ) -> None:
        self._target, self._stem, self._suffix = target, stem, suffix
        self._sink, self._file_bytes = sink, file_bytes
        self._open: Sink | None = None
        self.files: list[str] = []
        self.records = 0

    def write(self, records: pa.Table) -> None:
        for start in range(0, len(records), _STEP):
            piece = records.slice(start, _STEP)
            self._open = self._open or self._sink(records.schema)
            self._open.write(piece)
            self.records += len(piece)
            if self._open.size >= self._file_bytes:
                self.close()

    def close(self) -> None:
        if self._open is not None:
            name = f"{self._stem}-{len(self.files):05d}.{self._suffix}"
            self._target.write(name, self._open.close())
            self.files.append(name)
            self._open = None


#: On an object store the last object of a dataset.
DONE = "_SUCCESS"
#: Records between two looks at a file's size.
_STEP = 1024


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """The values as Arrow writes them: Python's own words for some depend on what else is installed."""
    try:
        texts: list[str | None] = pc.cast(column, pa.string()).to_pylist()
    except pa.ArrowNotImplementedError:
        raise SpecError(f"--split-by: a column of {column.type} values cannot be split by") from None
    return texts


def _records(storage: Storage, books: Books) -> Iterator[pa.Table]:
    """All records of the output, failed ones that stand in the parts included, a row group at a time."""
    for part in books.parts:
        name = f"data/{part.name}"
        try:
            with storage.open_input(name) as file, pq.ParquetFile(file) as parquet:
                for group in range(parquet.num_row_groups):
                    yield parquet.read_row_group(group).replace_schema_metadata(None)
        except (pa.ArrowException, OSError) as error:
            raise_if_damaged(error, storage.url(name))
            raise


@contextmanager
def _published(to: str) -> Iterator[Storage]:
    """The target to write to. A local one is a folder beside it, which takes its name at the end."""
    target = Storage(to)
    if there := target.list():
        raise OutputError(f"{to} already holds {there[0].name}: choose an empty folder")
    if "://" in target.root:
        try:
            yield target
        except BaseException:
            for info in target.list():
                target.delete(info.name)
            raise
        target.write(DONE, b"")
        return
    made = f"{target.root.rstrip('/')}.{uuid.uuid4().hex[:8]}.partial"
    try:
        os.makedirs(made)  # also of no records
        yield Storage(made)
        if os.path.isdir(target.root):
            os.rmdir(target.root)
        os.rename(made, target.root)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
