"""Where a row stands in its shard, from its id: `<path>#<position>`."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import Shard

_ROW_ID = r"(?s)^(?P<path>.*)#(?P<position>\d{1,18})$"


def places(row_ids: pa.ChunkedArray, shard: Shard) -> pa.Table:
    """`span` (its number in the shard; null for a row of none of them) and `position` of each row, as int64.

    Sorted by both, rows stand in input order. A shard has one span of a file at most (`jobs.cutting`).
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
    return pa.table({"span": span_number, "position": position})
