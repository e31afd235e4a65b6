"""A shard's rows, from whatever files and formats its spans name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.columns import keep_rows, rows_schema
from pipelines.contracts import Shard, Span
from pipelines.errors import ShardError
from pipelines.filter import compile_filter
from pipelines.read_csv import read_csv
from pipelines.read_jsonl import read_jsonl
from pipelines.read_parquet import read_parquet
from pipelines.settings import InputSettings
from pipelines.source import check_unchanged


@dataclass(frozen=True)
class Rows:
    """The rows of one shard, in input order."""

    table: pa.Table
    """The input columns, then row_id, error_code, error_message (set for rows that could not be read)."""
    rows_read: int
    """Rows that the shard's spans hold."""
    rows_filtered: int
    """Rows that `input.filter` did not select; `table` has the others."""

    def only(self, row_ids: pa.Array) -> Rows:
        """These rows as if there were no others, for a retry. Raises ShardError when one is not among them."""
        # By place: row_id is the third from the end, and the input may have a column of that name.
        table = self.table.filter(pc.is_in(self.table.column(self.table.num_columns - 3), value_set=row_ids))
        if len(table) != len(row_ids):
            raise ShardError(
                f"{len(row_ids) - len(table)} of {len(row_ids)} failed rows are not in the input any more; "
                "`dray verify --deep` tells whether the part is damaged"
            )
        return Rows(table, len(table), 0)


def read_shard(shard: Shard, settings: InputSettings, schema: pa.Schema) -> Rows:
    """Read a shard as the columns of `schema` (pinned by the plan).

    A row's id is `<path>#<position>`: the row's number in the file (Parquet, CSV), or the byte at which its line
    begins (JSONL; of the unpacked stream for gzip). Rows are numbered before the filter; a row with an error is never
    filtered out. Raises InputError for a file that is gone, changed since it was planned, or damaged as a whole.
    """
    columns = range(len(schema))  # not by name: the input may have a `row_id` of its own (chained jobs)
    condition = compile_filter(settings.filter) if settings.filter else None
    kept: list[pa.Table] = []
    rows_read = 0
    for span in shard.spans:
        check_unchanged(span, settings.storage_options)
        for chunk in _chunks(span, settings, schema):
            rows_read += chunk.num_rows
            kept.append(keep_rows(chunk, condition.mask(chunk.select(columns))) if condition else chunk)
    table = pa.concat_tables(kept) if kept else rows_schema(schema).empty_table()
    if any(pa.types.is_dictionary(item.type) for item in schema):
        table = table.unify_dictionaries()
    return Rows(table, rows_read, rows_read - table.num_rows)


def _chunks(span: Span, settings: InputSettings, schema: pa.Schema) -> Iterator[pa.Table]:
    options, strict = settings.storage_options, settings.columns is None
    match span.format:
        case "parquet":
            return read_parquet(span, schema, options)
        case "jsonl":
            return read_jsonl(span, schema, options, strict=strict)
        case "csv":
            return read_csv(span, schema, options, strict=strict)
