"""Rows of a CSV file with a header line (RFC 4180: quoted fields may hold commas, quotes and line breaks).

An empty field is null in a typed column and empty text in a text column; CSV cannot tell the two apart.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from pipelines.columns import RowErrors, build_column, rows_schema
from pipelines.contracts import Span
from pipelines.errors import InputError
from pipelines.source import buffered, open_span

_ROWS = 8192
INTEGER = re.compile(r"[+-]?\d+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)

# The module's limit of 128 KB a field is far below a long document; there is no limit per reader.
csv.field_size_limit(2**31 - 1)


def read_csv(span: Span, schema: pa.Schema, options: dict[str, Any], *, strict: bool) -> Iterator[pa.Table]:
    """The file's rows in order, as chunks of `schema` + row_id, error_code, error_message.

    Raises InputError for a header with a column that `schema` does not have (`strict`), or with one name twice.
    """
    with open_span(span, options) as file:
        records = parse(file)
        header = next(records, None)
        if header is None:
            return
        names = header_names(span.path, header)
        extra = [name for name in names if name not in schema.names]
        if extra and strict:
            raise InputError(
                f"{span.path}: column {extra[0]!r} is not in the planned schema; "
                "set input.columns to the planned columns to leave it out"
            )
        first, chunk = 0, list[list[str] | csv.Error]()
        for record in records:
            chunk.append(record)
            if len(chunk) >= _ROWS:
                yield _table(chunk, first, names, schema, span.path)
                first, chunk = first + len(chunk), []
        if chunk:
            yield _table(chunk, first, names, schema, span.path)


def parse(file: BinaryIO) -> Iterator[list[str] | csv.Error]:
    """The records, header first; for one that is no CSV, what is wrong with it. Blank lines are no records."""
    text = io.TextIOWrapper(buffered(file), "utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[type-var]
    with text:
        # strict: otherwise a quote that is never closed swallows the rest of the file into one valid field
        reader = csv.reader(text, strict=True)
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield error
                continue
            if record:
                yield record


def header_names(path: str, header: list[str] | csv.Error) -> list[str]:
    """Column names. Raises InputError for a header that is no CSV, or names a column twice."""
    if isinstance(header, csv.Error):
        raise InputError(f"{path}: the header line is not CSV: {header}; correct it")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: two columns are named {twice!r}; rename one")
    return header


def _table(
    records: list[list[str] | csv.Error], first: int, names: list[str], schema: pa.Schema, path: str
) -> pa.Table:
    errors = RowErrors()
    places = [
        (names.index(item.name) if item.name in names else None, _converter(item.type)) for item in schema
    ]
    columns: list[list[Any]] = [[None] * len(records) for _ in places]
    for row, record in enumerate(records):
        if isinstance(record, csv.Error):
            errors.add(row, "invalid_row", f"not CSV: {record}")
            continue
        if len(record) != len(names):
            errors.add(row, "invalid_row", f"{len(record)} fields where the header has {len(names)}")
        for i, (place, convert) in enumerate(places):
            if place is None or place >= len(record):
                continue
            try:
                columns[i][row] = convert(record[place])
            except ValueError:
                problem = f"{record[place][:60]!r} where {schema.field(i).type} is expected"
                errors.add(row, "invalid_row", f"column {schema.field(i).name!r}: {problem}")
    arrays = [build_column(values, item, errors) for values, item in zip(columns, schema, strict=True)]
    row_ids = pa.array([f"{path}#{first + row}" for row in range(len(records))], pa.string())
    return pa.table([*arrays, row_ids, *errors.columns(0, len(records))], schema=rows_schema(schema))


def _converter(type_: pa.DataType) -> Callable[[str], Any]:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return str
    if pa.types.is_boolean(type_):
        return _boolean
    if pa.types.is_integer(type_):
        return _integer
    if pa.types.is_floating(type_):
        return _floating
    return lambda text: pa.scalar(text).cast(type_).as_py() if text else None  # ArrowInvalid is a ValueError


def _boolean(text: str) -> bool | None:
    if not text:
        return None
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _integer(text: str) -> int | None:
    if not text:
        return None
    if not INTEGER.fullmatch(text.strip()):
        raise ValueError(text)
    return int(text)


def _floating(text: str) -> float | None:
    if not text:
        return None
    if not NUMBER.fullmatch(text.strip()):
        raise ValueError(text)
    return float(text)
