"""Records and lists of each other: `explode` makes a list's elements records, `gather` makes a row's records a list.

a record with a list ──explode──► a record for each element ──gather──► one record for each row of the input, with lists
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.place import element_ids, input_rows
from pipelines.step_settings import ExplodeStep, GatherStep


@dataclass(frozen=True)
class Elements:
    """Elements of lists, in the order of the records that have the lists and of the lists."""

    column: str
    values: pa.ChunkedArray
    record: npt.NDArray[np.int64]
    """For each element the place of the record that has the list."""
    number: npt.NDArray[np.int64]
    """Its place in the list."""

    def records(self, good: pa.Table) -> pa.Table:
        """A record for each element: that with the list, the element in a column more, and an id of its own."""
        records = good.take(pa.array(self.record))
        ids = element_ids(records["row_id"], pa.array(self.number))
        return with_ids(records, ids).append_column(self.column, self.values)


def explode(good: pa.Table, step: ExplodeStep) -> tuple[Elements, list[int]]:
    """(the elements of all records' lists; the records that have none and are dropped)."""
    least = 1 if step.on_empty == "null" else 0
    lists = _nested(good, step.column)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    elements = np.maximum(lengths, least)
    record = np.repeat(np.arange(len(good)), elements)
    number = np.arange(len(record)) - np.repeat(np.cumsum(elements) - elements, elements)
    place = (np.cumsum(lengths) - lengths)[record] + number
    found = pc.list_flatten(lists.filter(lists.is_valid()))
    values = found.take(pa.array(place, mask=lengths[record] == 0))
    return Elements(step.into, values, record, number), np.flatnonzero(elements == 0).tolist()


def gather(good: pa.Table, step: GatherStep) -> tuple[dict[str, pa.Array], list[int]]:
    """(the lists by column, each with the first record of its row of the input and null with the others; those others)."""
    rows = input_rows(good["row_id"]).combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(rows, kind="stable")
    # Rows are numbered as they come, so that those of one row lie between two of these in `order`.
    offsets = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
    first = np.zeros(len(good), bool)
    first[order[offsets[:-1]]] = True
    of_row = pa.array(rows, mask=~first)
    lists = {}
    for column, name in step.columns.items():
        values = _plain(_nested(good, column)).take(pa.array(order)).combine_chunks()
        lists[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values).take(of_row)
    return lists, np.flatnonzero(~first).tolist()


def with_ids(records: pa.Table, row_ids: pa.ChunkedArray) -> pa.Table:
    """The records as those of other rows."""
    place = records.column_names.index("row_id")
    return records.set_column(place, records.schema.field(place), row_ids)


def _nested(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The values whose type `nested_type` tells."""
    if column in table.column_names:
        return table[column]
    name, *fields = column.split(".")
    return pc.struct_field(table[name], fields)


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of a dictionary, which Parquet has no lists of."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
