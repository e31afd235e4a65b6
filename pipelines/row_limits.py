"""Each row's own `max_tokens`, from `sampling.max_tokens_column`."""

from __future__ import annotations

import pyarrow as pa

from pipelines.errors import RowError
from pipelines.settings import SamplingSettings

_MOST = 2**31 - 1


def row_limits(table: pa.Table, sampling: SamplingSettings) -> list[int | RowError | None]:
    """One per row of `table`: tokens, None for the job's `max_tokens`, or why the row's number will not do.

    A column that is not among the table's is null in every row (as a column that a later file lacks).
    """
    name = sampling.max_tokens_column
    if name is None or name not in table.column_names:
        return [None] * table.num_rows
    least = max(1, sampling.min_tokens)
    column = table.column(table.schema.get_all_field_indices(name)[0])
    return [
        value
        if value is None or least <= value <= _MOST
        else RowError(
            "invalid_request", f"max_tokens_column {name!r} is {value}; it must be from {least} to {_MOST}"
        )
        for value in column.to_pylist()
    ]
