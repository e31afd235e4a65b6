"""Values into the columns of the pinned schema; what does not fit becomes null and its row's error.

Columns are converted whole. Only a column that fails is looked at row by row, so clean data pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import ERROR_FIELDS, ROW_ID
from pipelines.errors import InputError
from pipelines.wording import first_line


class RowErrors:
    """The first error of each row of one chunk: row → (code, message)."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, str]] = {}

    def add(self, row: int, code: str, message: str) -> None:
        # Bytes that are not UTF-8 may stand in the message as well.
        clean = message[:400].encode("utf-8", "replace").decode()
        self._found.setdefault(row, (code, clean))

    def columns(self, start: int, stop: int) -> list[pa.Array]:
        """`error_code` and `error_message` of rows [start, stop)."""
        if not self._found:
            return [pa.nulls(stop - start, item.type) for item in ERROR_FIELDS]
        rows = [self._found.get(row, (None, None)) for row in range(start, stop)]
        return [pa.array([row[i] for row in rows], item.type) for i, item in enumerate(ERROR_FIELDS)]


def fit_column(column: pa.Array, item: pa.Field, path: str, errors: RowErrors) -> pa.Array:
    """A Parquet column as `item`'s type, with valid text.

    Arrow reads bytes into string columns without looking; a value that is not UTF-8 would make the output unreadable.
    Raises InputError when no value of the column's type can have `item`'s type.
    """
    if holds_text(column.type):
        column = _valid_text(column, item.name, errors)
    if column.type == item.type:
        return column
    try:
        return _cast(column, item.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return _by_row(
            column,
            lambda one: _cast(one, item.type),
            item.type,
            errors,
            "invalid_row",
            lambda error: f"column {item.name!r}: {error}",
        )
    except pa.ArrowNotImplementedError:
        raise InputError(
            f"{path}: column {item.name!r} is {column.type} and cannot become {item.type}; convert the file"
        ) from None


def build_column(values: Sequence[Any], item: pa.Field, errors: RowErrors) -> pa.Array | pa.ChunkedArray:
    """Python values (already of the right kind) as a column; text with lone surrogates is `invalid_utf8`."""
    try:
        return pa.array(values, item.type)
    except (
        UnicodeEncodeError,
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        OverflowError,
    ):
        clean = list(values)
        for row, value in enumerate(clean):
            try:
                pa.array([value], item.type)
            except UnicodeEncodeError:
                errors.add(row, "invalid_utf8", f"column {item.name!r} holds bytes that are not UTF-8")
                clean[row] = None
            except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
                errors.add(row, "invalid_row", f"column {item.name!r}: {first_line(error)}")
                clean[row] = None
        return pa.array(clean, item.type)


def holds_text(type_: pa.DataType) -> bool:
    """Whether strings occur anywhere in the type."""
    if pa.types.is_dictionary(type_):
        return holds_text(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return holds_text(type_.storage_type)
    if type_.num_fields:
        return any(holds_text(type_.field(i).type) for i in range(type_.num_fields))
    return bool(
        pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    )


def _cast(column: pa.Array, type_: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(type_) and not pa.types.is_dictionary(column.type):
        return column.cast(type_.value_type).dictionary_encode().cast(type_)
    if pa.types.is_dictionary(column.type) and not pa.types.is_dictionary(type_):
        return column.dictionary_decode().cast(type_)
    return column.cast(type_)


def _valid_text(column: pa.Array, name: str, errors: RowErrors) -> pa.Array:
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        pass
    # The bad value may sit in the dictionary itself, where no null of a row would remove it.
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def check(one: pa.Array) -> pa.Array:
        one.validate(full=True)
        return one

    clean = _by_row(
        plain,
        check,
        plain.type,
        errors,
        "invalid_utf8",
        lambda error: f"column {name!r} holds bytes that are not UTF-8",
    )
    return clean.dictionary_encode() if pa.types.is_dictionary(column.type) else clean


def _by_row(
    column: pa.Array,
    convert: Callable[[pa.Array], pa.Array],
    type_: pa.DataType,
    errors: RowErrors,
    code: str,
    say: Callable[[str], str],
) -> pa.Array:
    """`convert` for each row alone; rows that fail become null and an error."""
    keep: list[int | None] = []
    for row in range(len(column)):
        try:
            # `take` copies the one value; a slice of a list or struct still drags its neighbours' values along.
            convert(column.take(pa.array([row])))
            keep.append(row)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            errors.add(row, code, say(first_line(error)))
            keep.append(None)
    return convert(column.take(pa.array(keep, pa.int64()))) if len(column) else pa.nulls(0, type_)


def rows_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a shard's rows: the input's, then row_id, error_code, error_message."""
    return pa.schema([*schema, ROW_ID, *ERROR_FIELDS])


def keep_rows(table: pa.Table, mask: pa.BooleanArray) -> pa.Table:
    """Rows that the filter selects, and those that could not be read: their error must be counted, not filtered."""
    failed = pc.is_valid(table.column(table.num_columns - 2))
    return table.filter(pc.or_(mask, failed))
