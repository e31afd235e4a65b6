"""Where a row stands, from its id: `<path>#<position>`, and behind it `/k` for each `explode` that it went through.

data.parquet#7        the row of the input
data.parquet#7/0      the first element of the list that an `explode` has found in it
data.parquet#7/0/2    the third element of a list in that one
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import Shard

_ELEMENTS = r"(?:/\d{1,9})+"
_ROW_ID = rf"(?s)^(?P<path>.*)#(?P<position>\d{{1,18}})(?:{_ELEMENTS})?$"
_OF_LIST = rf"#\d{{1,18}}(?P<elements>{_ELEMENTS})$"


def places(row_ids: pa.ChunkedArray, shard: Shard) -> pa.Table:
    """`span` (its number in the shard; null for a row of none of them), `position` of each row and `element` (its rank
    among these rows' elements, 0 for rows of the input), as int64.

    Sorted by span, position, sample and element, records stand in their order. A shard has one span of a file at most
    (`jobs.cutting`).
    """
    spans = shard.spans
    parts = pc.extract_regex(row_ids.cast(pa.string()), _ROW_ID)
    position = pc.cast(pc.struct_field(parts, "position"), pa.int64())
    named = pc.index_in(
        pc.struct_field(parts, "path"), value_set=pa.array([span.path for span in spans], pa.string())
    )
    # Positions in a file that is read whole are rows, or bytes of the unpacked stream: any number.
    starts = pa.array([0 if span.unit == "file" else span.start for span in spans], pa.int64()).take(named)
    stops = pa.array([10**18 if span.unit == "file" else span.stop for span in spans], pa.int64()).take(named)
    inside = pc.and_(pc.greater_equal(position, starts), pc.less(position, stops))
    span_number = pc.if_else(inside, named, pa.scalar(None, pa.int32())).cast(pa.int64())
    return pa.table({"span": span_number, "position": position, "element": element_ranks(row_ids)})


#: The order of records: by these columns of `places` and the sample's index.
RECORD_ORDER = [(name, "ascending") for name in ("span", "position", "sample_index", "element")]


def element_ids(row_ids: pa.ChunkedArray, numbers: pa.Array) -> pa.ChunkedArray:
    """The ids of the rows that elements become: those of their lists' rows, and their places in the lists, from 0."""
    return pc.binary_join_element_wise(row_ids, pc.cast(numbers, pa.string()), "/")


def input_rows(row_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """For each row the id of the input's row that it comes from: its own, unless it is an element."""
    return pc.replace_substring_regex(row_ids.cast(pa.string()), rf"(#\d{{1,18}}){_ELEMENTS}$", r"\1")


def has_elements(row_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which of these rows have elements among them: they are rows no more, their elements are."""
    elements = row_ids.filter(pc.match_substring_regex(row_ids, _OF_LIST)).unique()
    lists = {row_id for element in elements.to_pylist() for row_id in rows_above(element)}
    return pc.is_in(row_ids, value_set=pa.array(sorted(lists), pa.string()))


def rows_above(row_id: str) -> list[str]:
    """The ids of the rows that a row is an element of; none for a row of the input."""
    start, _, place = row_id.rpartition("#")
    numbers = place.split("/")
    return [f"{start}#{'/'.join(numbers[:length])}" for length in range(1, len(numbers))]


def element_ranks(row_ids: pa.ChunkedArray) -> pa.Array:
    """Where each row stands among all of them by its places in lists, as numbers: `/2` before `/10`; 0 where all are rows
    of the input."""
    paths = _elements(row_ids).combine_chunks().dictionary_encode()
    numbers = [[int(number) for number in path.split("/")[1:]] for path in paths.dictionary.to_pylist()]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    ranks = {place: rank for rank, place in enumerate(order)}
    return pa.array([ranks[place] for place in range(len(numbers))], pa.int64()).take(paths.indices)


def depths(row_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """In how many lists, one in the other, each row is an element; 0 for a row of the input."""
    return pc.count_substring(_elements(row_ids), "/")


def _elements(row_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """What stands behind the input's row in each id: `/0/2`."""
    found = pc.extract_regex(row_ids.cast(pa.string()), _OF_LIST)
    return pc.fill_null(pc.struct_field(found, "elements"), "")
