"""Columns as Python values, where text may not be UTF-8: Arrow checks only on conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipelines.errors import RowError


def column_values(table: pa.Table, name: str, instead_of_null: Any = None) -> list[Any]:
    """The values of a column; a RowError in place of each that is not UTF-8. The first column of that name, or nulls."""
    places = table.schema.get_all_field_indices(name)
    if not places:
        return [instead_of_null] * table.num_rows
    column = table.column(places[0])
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(value, name) for value in column]
    if instead_of_null is None or column.null_count == 0:
        return values
    return [instead_of_null if value is None else value for value in values]


def records(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, Any] | RowError]:
    """Each row as a dict of these columns, or the error of its first value that has one."""
    columns = [column_values(table, name) for name in names]
    for values in zip(*columns, strict=True):
        yield first_error(values) or dict(zip(names, values, strict=True))


def first_error(values: Sequence[Any]) -> RowError | None:
    return next((value for value in values if isinstance(value, RowError)), None)


def _decoded(value: pa.Scalar, name: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return RowError("invalid_utf8", f"column {name!r} is not UTF-8")
