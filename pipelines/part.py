"""A part file: one shard's rows as Parquet, with the shard's statistics in the footer."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts import FORMAT_VERSION, Provenance, Shard, ShardStats
from pipelines.errors import OutputError
from pipelines.storage import Storage

#: Rows of a row group: readers stream such groups, and 16 Ki text rows stay near a few megabytes.
ROW_GROUP_ROWS = 16_384
#: Key of the footer's JSON among the Parquet file's key-value metadata.
FOOTER_KEY = b"dray"


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a part says of itself, under the key `dray` of the Parquet footer."""

    format_version: int
    shard: Shard
    fingerprint: str
    stats: ShardStats
    provenance: Provenance
    error_examples: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each error code the `row_id` and `error_message` of the first row that has it."""
    errors_object: str | None = None
    """Where the failed rows are, with `output.failed_rows: separate`."""

    def to_json(self) -> str:
        data = {**asdict(self), "stats": self.stats.to_dict()}
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Footer:
        """Raises OutputError when a newer Dray wrote it."""
        data = json.loads(text)
        if data["format_version"] > FORMAT_VERSION:
            raise OutputError(
                f"{where} has output format {data['format_version']}; this Dray reads up to {FORMAT_VERSION}: upgrade it"
            )
        return cls(
            **{
                **data,
                "shard": Shard.from_json(json.dumps(data["shard"])),
                "stats": ShardStats.from_dict(data["stats"]),
                "provenance": Provenance(**data["provenance"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A committed part, as its footer tells it."""

    name: str
    """Object name below `data/`."""
    rows: int
    """Rows in the file."""
    schema: pa.Schema
    footer: Footer


def read_part(storage: Storage, name: str) -> Part:
    """Read the footer of `data/<name>`. Raises OutputError when that is damaged or no part of ours."""
    where = storage.url(f"data/{name}")
    try:
        with storage.open_input(f"data/{name}") as file, pq.ParquetFile(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the store's; a damaged footer is an OSError without a number
        raise OutputError(f"{where} is damaged: {str(error).splitlines()[0]}") from error
    if FOOTER_KEY not in (metadata.metadata or {}):
        raise OutputError(f"{where} is no part of a Dray output; move it away")
    footer = Footer.from_json(metadata.metadata[FOOTER_KEY], where)
    return Part(name=name, rows=metadata.num_rows, schema=schema, footer=footer)


def to_parquet(table: pa.Table, compression: str, metadata: dict[bytes, str]) -> bytes:
    """A closed Parquet file in memory."""
    table = table.replace_schema_metadata(metadata or None)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue()
