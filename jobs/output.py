"""The output folder: claimed for one spec, finished with `_SUCCESS`, readable as a dataset in between."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from jobs.books import SUCCESS, Books
from jobs.card import output_card
from jobs.fingerprint import explain_difference
from jobs.loading import LoadedJob
from jobs.pinning import PIN
from jobs.references import references_in
from jobs.report import Report, percentiles
from pipelines import __version__
from pipelines.contracts import FORMAT_VERSION
from pipelines.errors import OutputError
from pipelines.part import to_parquet
from pipelines.storage import Storage

SPEC = ".dray/spec.json"


def read_spec(storage: Storage) -> dict[str, Any] | None:
    """What `claim` stored; None when the folder is no output of Dray's. Raises OutputError for a newer format."""
    if not storage.exists(SPEC):
        return None
    record: dict[str, Any] = json.loads(storage.read(SPEC))
    if record["format_version"] > FORMAT_VERSION:
        raise OutputError(
            f"{storage.url('')} has output format {record['format_version']}; this Dray reads up to {FORMAT_VERSION}: "
            "upgrade it"
        )
    return record


def check_claim(storage: Storage, fingerprint: str, identity: Mapping[str, Any]) -> None:
    """Raise OutputError when the folder holds other data, or the output of a different spec."""
    record = read_spec(storage)
    if record is None:
        # All that a run writes, overwrites or clears away.
        foreign = [info.name for folder in ("data", "errors", "stats") for info in storage.list(folder)]
        foreign += [name for name in ("README.md",) if storage.exists(name)]
        if not foreign:
            return
        record = read_spec(storage)  # once more: another driver may have begun since
        if record is None:
            raise OutputError(
                f"{storage.url()} already holds {foreign[0]}, which no Dray job wrote: choose another output.path"
            )
    if record["fingerprint"] != fingerprint:
        changed = explain_difference(record["identity"], identity)
        raise OutputError(
            f"{storage.url()} holds the output of a different spec ({'; '.join(changed) or 'other content'}): "
            "choose another output.path, or delete that folder"
        )


def claim(storage: Storage, job: LoadedJob, fingerprint: str, identity: Mapping[str, Any]) -> None:
    """Make the folder this job's output, or check that it is already. Raises OutputError.

    Stored are the spec as written, with its references, and `identity`: what the fingerprint was taken of.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "dray_version": __version__,
        "created_at": time.time(),
        "name": job.spec.name,
        "max_error_rate": job.spec.errors.max_error_rate,
        "fingerprint": fingerprint,
        "identity": identity,
        "spec": job.raw,
        PIN: job.pin,
        # Each date has an output of its own then, and whoever resumes it later must not fill in another one.
        "variables": job.variables if references_in(job.raw["output"]["path"], "run") else None,
    }
    check_claim(storage, fingerprint, identity)
    # In the order of the job file: that of the keys of `parse.json`, `map.adds` and others is that of the columns.
    storage.create(SPEC, json.dumps(record, indent=1).encode())


def write_stats(storage: Storage, books: Books) -> None:
    """`stats/shards.parquet`: one row per committed shard; can be rebuilt from the footers at any time."""
    if not books.parts:
        storage.delete("stats/shards.parquet")
        return
    rows = []
    for part in books.parts:
        footer = part.footer
        counts = {k: v for k, v in footer.stats.to_dict().items() if not isinstance(v, dict)}
        rows.append(
            {
                "ordinal": footer.shard.ordinal,
                "shard_id": footer.shard.id,
                "part": f"data/{part.name}",
                **counts,
                **{f"latency_{k}_s": v for k, v in percentiles(footer.stats, "latency_s").items()},
                **{f"ttft_{k}_s": v for k, v in percentiles(footer.stats, "ttft_s").items()},
                "error_codes": json.dumps(footer.stats.error_codes),
                "finish_reasons": json.dumps(footer.stats.finish_reasons),
                "steps": json.dumps(footer.stats.steps),
                "output_bytes": books.sizes[part.name],
                "fingerprint": footer.fingerprint,
                "retries": len(footer.retries),
                **asdict(footer.provenance),
            }
        )
    table = pa.Table.from_pylist(rows)
    # What no engine told is null in every row; a number's column stays one.
    fields = [
        field.with_type(pa.float64()) if pa.types.is_null(field.type) else field for field in table.schema
    ]
    storage.write("stats/shards.parquet", to_parquet(table.cast(pa.schema(fields)), "zstd"))


def write_card(storage: Storage, books: Books, report: Report) -> None:
    """`README.md`, the dataset card: `jobs.card`."""
    record = read_spec(storage)
    assert record is not None  # `claim` wrote it
    storage.write("README.md", output_card(storage, record, books, report).encode())


def succeed(storage: Storage, report: Report) -> None:
    """Write `data/_SUCCESS`, the last object of a job."""
    summary = {
        "rows": report.stats.rows_in,
        "shards": report.shards_committed,
        "fingerprint": report.fingerprint,
    }
    storage.write(SUCCESS, json.dumps(summary).encode())
