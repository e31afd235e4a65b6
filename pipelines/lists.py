"""Records and lists of each other: `explode` makes several records of one, `gather` makes a row's records a list.

a record with a list ──explode──► a record for each element ──gather──► one record for each row of the input, with lists
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.place import element_ids, input_rows
from pipelines.step_settings import ExplodeStep, GatherStep


@dataclass(frozen=True)
class Elements:
    """What records become several of, in the order of the records and of their elements."""

    added: Mapping[str, pa.Array | pa.ChunkedArray]
    """New columns; one value for each element."""
    record: npt.NDArray[np.int64]
    """For each element the place of its record."""
    number: npt.NDArray[np.int64]
    """Its place among the elements of that."""

    def records(self, good: pa.Table) -> pa.Table:
        """A record for each element: the one that it is of, with the new columns and an id of its own."""
        records = good.take(pa.array(self.record))
        records = with_ids(records, element_ids(records["row_id"], pa.array(self.number)))
        for column, values in self.added.items():
            records = records.append_column(column, values)
        return records


def explode(good: pa.Table, step: ExplodeStep) -> tuple[Elements, list[int]]:
    """(the elements of all records; the records that have none and are dropped)."""
    if step.column is not None:
        return _of_lists(good, step.column, step.into, 1 if step.on_empty == "null" else 0)
    names = step.values or step.columns or ()
    record = np.repeat(np.arange(len(good)), len(names))
    number = np.tile(np.arange(len(names)), len(good))
    labels = pa.array(names, pa.string()).take(pa.array(number))
    if step.columns is None:
        return Elements({step.into: labels}, record, number), []
    # One column behind the other; then the first value of each, the second of each …
    chunks = [chunk for name in names for chunk in good[name].chunks]
    values = pa.chunked_array(chunks, good[names[0]].type)
    added: dict[str, pa.Array | pa.ChunkedArray] = {
        step.into: values.take(pa.array(number * len(good) + record))
    }
    if step.name_into:
        added[step.name_into] = labels
    return Elements(added, record, number), []


def _of_lists(good: pa.Table, column: str, into: str, least: int) -> tuple[Elements, list[int]]:
    """Of a column of lists; each record has `least` elements, null where its list has none."""
    lists = _nested(good, column)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    elements = np.maximum(lengths, least)
    record = np.repeat(np.arange(len(good)), elements)
    number = np.arange(len(record)) - np.repeat(np.cumsum(elements) - elements, elements)
    place = (np.cumsum(lengths) - lengths)[record] + number
    found = pc.list_flatten(lists.filter(lists.is_valid()))
    values = found.take(pa.array(place, mask=lengths[record] == 0))
    return Elements({into: values}, record, number), np.flatnonzero(elements == 0).tolist()


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
