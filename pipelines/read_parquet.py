"""Rows of a Parquet file by position, reading only the row groups and columns that are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.columns import RowErrors, fit_column, rows_schema
from pipelines.contracts import Span
from pipelines.errors import InputError
from pipelines.source import open_binary, open_span
from pipelines.storage import VersionChanged
from pipelines.wording import first_line

#: Rows decoded at once. Small enough that slices at a shard's edges hold on to little.
_BATCH = 4096
#: Read-ahead per column when a shard wants only a piece of a large row group.
_BUFFER = 1 << 20
#: How lists stand in a leaf's path, by several writers.
_LISTS = ("list", "element", "item", "array", "bag", "array_element")
#: Where a part of a message says which image it is (`messages.checked`): for each of its fields, the leaves that may be it.
_SOURCES = (
    [("image_url",), ("image_url", "url"), ("image_url", "bytes"), ("image_url", "path")],
    [("image",), ("image", "url"), ("image", "bytes"), ("image", "path")],
    [("url",)],
    [("path",)],
)


class Footer:
    """What planning needs of a Parquet footer."""

    def __init__(self, metadata: pq.FileMetaData, schema: pa.Schema) -> None:
        self.schema = schema
        self.row_groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self._metadata = metadata

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    def data_bytes(self, columns: Collection[str] | None) -> int:
        """Uncompressed bytes of the given top-level columns, of all when None."""
        if columns is None:
            return sum(
                self._metadata.row_group(i).total_byte_size for i in range(self._metadata.num_row_groups)
            )
        return sum(chunk.total_uncompressed_size for name in columns for chunk in self._chunks(name))

    def values(self, column: str) -> int:
        """How many values a top-level column has, those of its lists one by one, nulls and empty lists among them."""
        of_leaf: dict[str, int] = {}
        for chunk in self._chunks(column):
            of_leaf[chunk.path_in_schema] = of_leaf.get(chunk.path_in_schema, 0) + chunk.num_values
        return max(of_leaf.values(), default=0)

    def message_images(self, column: str) -> tuple[int, int]:
        """(images among the parts of a column of messages, bytes that name or hold them), by the parts' fields that say which image;
        (0, 0) of messages as JSON text, and of files whose statistics count no nulls."""
        images = size = 0
        for chunks in self._groups(column):
            parts = _leaves_of_parts(column, chunks)
            if found := _images_among(parts):
                images += found
                size += sum(
                    parts[leaf].total_uncompressed_size
                    for field in _SOURCES
                    for leaf in field
                    if leaf in parts
                )
        return images, size

    def _chunks(self, column: str) -> Iterator[pq.ColumnChunkMetaData]:
        for chunks in self._groups(column):
            yield from chunks

    def _groups(self, column: str) -> Iterator[list[pq.ColumnChunkMetaData]]:
        """The leaves of a top-level column, one row group after the other."""
        for i in range(self._metadata.num_row_groups):
            group = self._metadata.row_group(i)
            chunks = [group.column(j) for j in range(group.num_columns)]
            yield [one for one in chunks if f"{one.path_in_schema}.".startswith(f"{column}.")]


def _leaves_of_parts(
    column: str, chunks: Iterable[pq.ColumnChunkMetaData]
) -> dict[tuple[str, ...], pq.ColumnChunkMetaData]:
    """The leaves of the content parts of messages, by their names below the part."""
    found = {}
    for chunk in chunks:
        names = chunk.path_in_schema.removeprefix(column).split(".")
        _, *inside = [name for name in names if name not in _LISTS]
        if inside[:1] == ["content"]:
            found[tuple(inside[1:])] = chunk
    return found


def _images_among(parts: Mapping[tuple[str, ...], pq.ColumnChunkMetaData]) -> int:
    """How many parts are images. A text, too, can have a url: where some parts have no text, the images are among those."""
    named = sum(
        max((_present(parts[leaf]) for leaf in field if leaf in parts), default=0) for field in _SOURCES
    )
    types, texts = parts.get(("type",)), parts.get(("text",))
    if types is None or texts is None or not _present(types):
        return named
    if types.statistics.has_min_max and types.statistics.min == types.statistics.max == "text":
        return 0
    without_text = _present(types) - _present(texts)
    return min(named, without_text) if without_text > 0 else named  # some writers give images an empty text


def _present(chunk: pq.ColumnChunkMetaData) -> int:
    """Values that are not null; 0 where the statistics do not say."""
    if not chunk.is_stats_set or not chunk.statistics.has_null_count:
        return 0
    return int(chunk.num_values - chunk.statistics.null_count)


def footer_of(path: str, options: dict[str, Any]) -> Footer:
    """The footer of the file at `path`. Raises InputError when it is not Parquet or damaged."""
    with open_binary(path, options) as file:
        try:
            parquet = pq.ParquetFile(file)
            return Footer(parquet.metadata, parquet.schema_arrow)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise _damage(path, error) from None


def read_parquet(span: Span, schema: pa.Schema, options: dict[str, Any]) -> Iterator[pa.Table]:
    """Rows [span.start, span.stop) in order, as chunks of `schema` + row_id, error_code, error_message.

    Memory holds one chunk and the pages under it. Raises InputError for a file that cannot be decoded.
    """
    with open_span(span, options) as file:
        try:
            parquet = pq.ParquetFile(file)
            names = [name for name in schema.names if name in parquet.schema_arrow.names]
            position = 0
            groups: list[int] = []
            first = None
            for i in range(parquet.num_row_groups):
                stop = position + parquet.metadata.row_group(i).num_rows
                if position < span.stop and stop > span.start:
                    groups.append(i)
                    first = position if first is None else first
                position = stop
            if first is None:
                return
            covered = sum(parquet.metadata.row_group(i).num_rows for i in groups)
            # Coalesced reads of whole row groups are faster on object stores, but would hold all of a large group
            # for a shard that wants a little of it.
            whole = (span.stop - span.start) * 2 >= covered
            parquet = pq.ParquetFile(
                file, metadata=parquet.metadata, pre_buffer=whole, buffer_size=0 if whole else _BUFFER
            )
            row = first
            batches = (
                parquet.iter_batches(min(_BATCH, span.stop - span.start), row_groups=groups, columns=names)
                if names
                else _bare(covered)
            )
            for batch in batches:
                start, stop = max(span.start - row, 0), min(span.stop - row, batch.num_rows)
                if start < stop:
                    yield _chunk(batch.slice(start, stop - start), row + start, schema, span.path)
                row += batch.num_rows
                if row >= span.stop:
                    return
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise _damage(span.path, error) from None


def _chunk(batch: pa.RecordBatch, first: int, schema: pa.Schema, path: str) -> pa.Table:
    errors = RowErrors()
    columns = []
    for item in schema:
        index = batch.schema.get_field_index(item.name)
        column = pa.nulls(batch.num_rows, item.type) if index < 0 else batch.column(index)
        columns.append(fit_column(column, item, path, errors))
    row_ids = pa.array([f"{path}#{row}" for row in range(first, first + batch.num_rows)], pa.string())
    return pa.table([*columns, row_ids, *errors.columns(0, batch.num_rows)], schema=rows_schema(schema))


def _bare(rows: int) -> Iterator[pa.RecordBatch]:
    """Rows without columns: the file has none of the schema's."""
    empty = pa.struct([])
    for start in range(0, rows, _BATCH):
        yield pa.RecordBatch.from_struct_array(pa.array([{}] * min(_BATCH, rows - start), empty))


def _damage(path: str, error: Exception) -> Exception:
    """InputError for bytes that are not Parquet; a fault of the store stays what it is.

    Arrow raises OSError for damaged pages and headers; only the system's have an errno.
    """
    if isinstance(error, VersionChanged) or (isinstance(error, OSError) and error.errno is not None):
        return error
    return InputError(
        f"{path}: not readable as Parquet: {first_line(error)}; remove the file from the input or write it again"
    )
