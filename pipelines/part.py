"""A part file: one shard's rows as Parquet, with the shard's statistics in the footer."""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.contracts import FORMAT_VERSION, Shard
from pipelines.counting import error_examples
from pipelines.errors import OutputError, PartDamaged
from pipelines.settings import OutputSettings
from pipelines.shard_stats import Provenance, ShardStats
from pipelines.storage import Storage

#: Rows of a row group: readers stream such groups, and 16 Ki text rows stay near a few megabytes.
ROW_GROUP_ROWS = 16_384
#: Key of the footer's JSON among the Parquet file's key-value metadata.
FOOTER_KEY = b"dray"
#: A Parquet file ends in the length of its metadata (4 bytes) and `PAR1`.
_TAIL = 8


@dataclass(frozen=True, kw_only=True)
class Retried:
    """One retry of a part's failed rows (`dray retry-failed`)."""

    fingerprint: str
    """Of the settings used."""
    stats: ShardStats
    """Of the rows that were run again, `rows_in`; `rows_ok` of them have an answer now."""
    provenance: Provenance
    """Which run, where and when."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stats": self.stats.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Retried:
        stats = ShardStats.from_dict(data["stats"])
        return cls(**{**data, "stats": stats, "provenance": Provenance.from_dict(data["provenance"])})


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a part says of itself, under the key `dray` of the Parquet footer."""

    format_version: int
    shard: Shard
    fingerprint: str
    stats: ShardStats
    provenance: Provenance
    """Of the first commit; rows tell by `run_id` which run answered them."""
    error_examples: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each error code the `row_id` and `error_message` of the first row that has it."""
    errors_object: str | None = None
    """Where the failed rows are, with `output.failed_rows: separate`."""
    errors_digest: str | None = None
    """SHA-256 of that object."""
    digest: str | None = None
    """`body_digest` of the part; None for parts that were written before there was one."""
    retries: tuple[Retried, ...] = ()
    """What was merged into the part since its first commit, in order."""

    def retry_by(self, run_id: str) -> Retried | None:
        """What this run has merged; None when it has not (yet)."""
        return next((one for one in self.retries if one.provenance.run_id == run_id), None)

    def to_json(self) -> str:
        data = {
            **asdict(self),
            "stats": self.stats.to_dict(),
            "retries": [one.to_dict() for one in self.retries],
        }
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
                "provenance": Provenance.from_dict(data["provenance"]),
                "retries": tuple(map(Retried.from_dict, data.get("retries", ()))),
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


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_part(storage: Storage, name: str) -> Part:
    """Read the footer of `data/<name>`. Raises PartDamaged, or OutputError for one that a newer Dray wrote."""
    where = storage.url(f"data/{name}")
    try:
        with storage.open_input(f"data/{name}") as file:
            return part_of(file, name, where)
    except OSError as error:
        raise_if_damaged(error, where)
        raise


def part_of(file: BinaryIO | pa.NativeFile, name: str, where: str) -> Part:
    """The part that an open file holds. Raises as `read_part`."""
    try:
        with pq.ParquetFile(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise_if_damaged(error, where)
        raise
    if FOOTER_KEY not in (metadata.metadata or {}):
        raise PartDamaged(f"{where} is no part of a Dray output; move it away")
    try:
        footer = Footer.from_json(metadata.metadata[FOOTER_KEY], where)
    except (ValueError, KeyError, TypeError) as error:
        raise PartDamaged(f"{where} is damaged: its footer cannot be read: {error!r}") from error
    return Part(name=name, rows=metadata.num_rows, schema=schema, footer=footer)


def raise_if_damaged(error: Exception, where: str) -> None:
    """Raise PartDamaged for what Arrow says of broken bytes; return for a fault of the store.

    Arrow raises OSError for damaged footers and pages; only the system's have an errno.
    """
    if not isinstance(error, OSError) or error.errno is None:
        raise PartDamaged(f"{where} is damaged: {(str(error) or repr(error)).splitlines()[0]}") from error


def body_digest(data: bytes | memoryview) -> str:
    """SHA-256 of a Parquet file up to its footer, which holds the digest: all row groups.

    The footer's place: https://parquet.apache.org/docs/file-format/
    """
    view = memoryview(data)
    footer_bytes = int.from_bytes(view[-_TAIL:-4], "little")
    return hashlib.sha256(view[: len(view) - _TAIL - footer_bytes]).hexdigest()


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def build_part(
    storage: Storage, rows: pa.Table, footer: Footer, output: OutputSettings
) -> tuple[bytes, Footer]:
    """All rows of a shard as the bytes of its part, and the footer in it, which gets what the bytes tell.

    With `failed_rows: separate` the failed rows are written to `errors/` first, under a new name each time: an attempt
    that comes second cannot overwrite what the part refers to.
    """
    footer = replace(
        footer, error_examples=error_examples(rows), errors_object=None, errors_digest=None, digest=None
    )
    if output.failed_rows == "separate":
        failed = pc.is_valid(rows["error_code"])
        errors, rows = rows.filter(failed), rows.filter(pc.invert(failed))
        if len(errors):
            name = f"errors/{footer.shard.part_name.removesuffix('.parquet')}-{uuid.uuid4().hex[:8]}.parquet"
            data = to_parquet(errors, output.compression)
            storage.write(name, data)
            footer = replace(footer, errors_object=name, errors_digest=hashlib.sha256(data).hexdigest())
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, rows.schema, compression=output.compression) as writer:
        writer.write_table(rows, ROW_GROUP_ROWS)
        # All row groups are in the sink now; closing adds the Parquet footer and nothing else.
        footer = replace(footer, digest=hashlib.sha256(sink.getbuffer()).hexdigest())
        writer.add_key_value_metadata({FOOTER_KEY: footer.to_json()})
    return sink.getvalue(), footer


def to_parquet(table: pa.Table, compression: str) -> bytes:
    """A closed Parquet file in memory."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue()
