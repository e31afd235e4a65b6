"""A simple random sample of a job's rows, from all over the input: each row is as likely as any other.

Where all row counts are known (Parquet) places are drawn first and only the row groups that hold them are read. JSONL, CSV and
gzip are read through once, and rows are kept with equal chances on the way: a random byte would find long lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.cutting import cut_lazily
from pipelines.columns import rows_schema
from pipelines.contracts import InputFile, Shard, Span, Work
from pipelines.errors import InputError
from pipelines.read import read_shard

#: Sampled rows of one row group farther apart than this are read apart.
_GAP = 16_384
#: Rows read at once of files that are read through.
_THROUGH = 10_000


@dataclass(frozen=True, kw_only=True)
class RowSample:
    """Sampled rows that passed the filter, and what they stand for."""

    table: pa.Table
    """The input columns, then row_id, error_code, error_message, in input order."""
    drawn: int
    """Rows drawn, those that the filter dropped included."""
    population: int
    """Rows that they were drawn from: of the input; where it was read through, those of it that pass the filter."""
    rows_read: int
    """Rows of the input."""


def sample_rows(files: Sequence[InputFile], work: Work, count: int, seed: int) -> RowSample:
    """Draw `count` rows, or all where there are fewer. Raises InputError for an input without rows."""
    random = np.random.default_rng(seed)
    known = [file.rows for file in files if file.rows is not None]
    sample = (
        _by_place(files, known, work, count, random)
        if len(known) == len(files)
        else _read_through(files, work, count, random)
    )
    if not sample.rows_read:
        raise InputError("the input has no rows")
    return sample


def _by_place(
    files: Sequence[InputFile], rows: Sequence[int], work: Work, count: int, random: np.random.Generator
) -> RowSample:
    total = sum(rows)
    drawn = np.sort(random.choice(total, min(count, total), replace=False))
    found = [_empty(work)]
    before = 0
    for file, n in zip(files, rows, strict=True):
        here = drawn[(drawn >= before) & (drawn < before + n)] - before
        before += n
        for places in _near(here, file.row_groups):
            span = Span(
                path=file.path,
                version=file.version,
                size=file.size,
                format=file.format,
                compression=file.compression,
                unit="rows",
                start=int(places[0]),
                stop=int(places[-1]) + 1,
            )
            read = read_shard(_shard(span), work.input, work.input_schema).table
            ids = pa.array([f"{file.path}#{place}" for place in places])
            # By place: the input may have a column `row_id` of its own.
            found.append(read.filter(pc.is_in(read.column(read.num_columns - 3), value_set=ids)))
    return RowSample(
        table=pa.concat_tables(found, promote_options="permissive"),
        drawn=len(drawn),
        population=total,
        rows_read=total,
    )


def _near(places: npt.NDArray[np.int64], row_groups: Sequence[int]) -> Iterator[npt.NDArray[np.int64]]:
    """Places of one row group that are read together."""
    if not len(places):
        return
    group = np.searchsorted(np.cumsum(row_groups), places, side="right")
    cuts = np.flatnonzero((np.diff(group) > 0) | (np.diff(places) > _GAP)) + 1
    yield from np.split(places, cuts)


def _shard(span: Span) -> Shard:
    return Shard(ordinal=0, id="", spans=(span,), rows=span.stop - span.start, bytes=0)


def _read_through(
    files: Sequence[InputFile], work: Work, count: int, random: np.random.Generator
) -> RowSample:
    """Each row that passes the filter gets a random number; those with the `count` smallest stay."""
    kept, keys = _empty(work), np.empty(0)
    rows_read = passed = 0
    for shard in cut_lazily(files, _THROUGH):
        rows = read_shard(shard, work.input, work.input_schema)
        rows_read, passed = rows_read + rows.rows_read, passed + len(rows.table)
        kept = pa.concat_tables([kept, rows.table], promote_options="permissive")
        keys = np.concatenate([keys, random.random(len(rows.table))])
        if len(keys) > count:
            stay = np.sort(np.argpartition(keys, count - 1)[:count])
            kept, keys = kept.take(stay).combine_chunks(), keys[stay]
    return RowSample(table=kept, drawn=len(kept), population=passed, rows_read=rows_read)


def _empty(work: Work) -> pa.Table:
    return rows_schema(work.input_schema).empty_table()
