"""One step of a plan as an Arrow IPC file: what a listing found new, and the shards that it was cut into.

The file has one row. Its columns `files` and `shards` are lists of structs, so that one object holds both tables and
`pyarrow.ipc.open_file` shows them. Spans name their file by its position in `files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.contracts import FORMAT_VERSION, InputFile, Shard, Span
from pipelines.errors import OutputError

_FILE = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("version", pa.string()),
        pa.field("format", pa.string()),
        pa.field("compression", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("estimated_rows", pa.int64()),
        pa.field("data_bytes", pa.int64()),
        pa.field("image_bytes", pa.int64()),
        pa.field("images", pa.int64()),
    ]
)
_SPAN = pa.struct(
    [
        pa.field("file", pa.int32()),
        pa.field("unit", pa.string()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
    ]
)
_SHARD = pa.struct(
    [
        pa.field("ordinal", pa.int32()),
        pa.field("id", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("spans", pa.list_(_SPAN)),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What one extension added to a plan."""

    number: int
    """Place in the plan, from 0; names the object."""
    fingerprint: str
    schema: pa.Schema
    """The pinned input schema; the same in every segment."""
    files: tuple[InputFile, ...]
    """Files that are new, or planned anew. `row_groups` and `schema` are not stored."""
    shards: tuple[Shard, ...]
    supersedes: tuple[str, ...] = ()
    """Ids of earlier shards whose rows are planned anew here."""
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """Object name below the output."""
        return f".dray/plan/{self.number:06d}.arrow"


def encode(segment: Segment) -> bytes:
    """The Arrow IPC file."""
    places = {file.path: i for i, file in enumerate(segment.files)}
    spans = [span for shard in segment.shards for span in shard.spans]
    span_ends = [0]
    for shard in segment.shards:
        span_ends.append(span_ends[-1] + len(shard.spans))
    span_columns = [
        pa.array([places[span.path] for span in spans], pa.int32()),
        *(_column(spans, item) for item in list(_SPAN)[1:]),
    ]
    span_lists = pa.ListArray.from_arrays(
        pa.array(span_ends, pa.int32()), pa.StructArray.from_arrays(span_columns, fields=list(_SPAN))
    )
    shard_columns = [*(_column(segment.shards, item) for item in list(_SHARD)[:-1]), span_lists]
    file_columns = [_column(segment.files, item) for item in _FILE]
    table = pa.table(
        {
            "format_version": pa.array([segment.format_version], pa.int32()),
            "fingerprint": [segment.fingerprint],
            "input_schema": pa.array([segment.schema.serialize().to_pybytes()], pa.binary()),
            "supersedes": pa.array([list(segment.supersedes)], pa.list_(pa.string())),
            "files": _one_list(file_columns, _FILE),
            "shards": _one_list(shard_columns, _SHARD),
        }
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(
        compression="zstd"
    )  # paths repeat: 100,000 of them take 2 MB instead of 20
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode(number: int, data: bytes, where: str) -> Segment:
    """The segment of `encode`. Raises OutputError for one that a newer Dray wrote, or that is damaged."""
    try:
        row = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowInvalid as error:
        raise OutputError(
            f"{where}: the plan is damaged ({error}); restore it, or use a new output.path"
        ) from None
    version = row["format_version"][0].as_py()
    if version > FORMAT_VERSION:
        raise OutputError(
            f"{where}: written by a newer Dray (format {version}, this one knows {FORMAT_VERSION}); upgrade Dray"
        )
    files = tuple(InputFile(**values) for values in _rows(_values(row["files"])))
    shards_array = _values(row["shards"])
    span_lists = shards_array.field("spans")
    spans = []
    for span in _rows(span_lists.values):
        file = files[span["file"]]
        spans.append(
            Span(
                path=file.path,
                version=file.version,
                size=file.size,
                format=file.format,
                compression=file.compression,
                unit=span["unit"],
                start=span["start"],
                stop=span["stop"],
            )
        )
    ends = span_lists.offsets.to_pylist()
    names = [item.name for item in list(_SHARD)[:-1]]
    shards = tuple(
        Shard(**values, spans=tuple(spans[ends[i] : ends[i + 1]]))
        for i, values in enumerate(_rows(shards_array, names))
    )
    return Segment(
        number=number,
        fingerprint=row["fingerprint"][0].as_py(),
        schema=pa.ipc.read_schema(pa.py_buffer(row["input_schema"][0].as_py())),
        files=files,
        shards=shards,
        supersedes=tuple(row["supersedes"][0].as_py()),
        format_version=version,
    )


def _column(items: Sequence[Any], item: pa.Field) -> pa.Array:
    return pa.array([getattr(one, item.name) for one in items], item.type)


def _one_list(columns: Sequence[pa.Array], type_: pa.StructType) -> pa.Array:
    """All rows of the columns as the single value of a list column."""
    struct = pa.StructArray.from_arrays(columns, fields=list(type_))
    return pa.ListArray.from_arrays(pa.array([0, len(struct)], pa.int32()), struct)


def _values(column: pa.ChunkedArray) -> pa.StructArray:
    return column.chunk(0).values


def _rows(array: pa.StructArray, names: Sequence[str] | None = None) -> Iterable[dict[str, Any]]:
    """Rows as dictionaries, column by column: ten times faster than `to_pylist` of a struct array."""
    names = names or [item.name for item in array.type]
    columns = [array.field(name).to_pylist() for name in names]
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
