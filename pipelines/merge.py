"""A retry's results into the part that stands for their shard: `dray retry-failed`.

    part ──failed_rows──► prepare ──► generate ──► result ──merge──► the same part, if it is still that version

A merge changes rows that have failed and nothing else, so that it may come late, twice, or beside another one: an answer
is never replaced, every version of the part holds every row of its shard once, and whoever meets another version than
the one it read starts over. An element of a list is a row: the input's row that it comes from is answered again, and of
what comes out only what stands under the ids of failed rows is taken. The footer names each run that has merged, so that Ray's repeats find their work done.
See docs/decisions/0006.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.contracts import FORMAT_VERSION, Shard, Work
from pipelines.counting import count, count_rows, recount
from pipelines.dedup_keys import keep_keys
from pipelines.errors import PartDamaged, ShardError
from pipelines.part import Footer, Part, Retried, build_part, part_of, raise_if_damaged, read_part, to_parquet
from pipelines.place import RECORD_ORDER, input_rows, places, rows_above
from pipelines.settings import OutputSettings
from pipelines.shard_stats import Provenance
from pipelines.stage import Parcel
from pipelines.step_settings import StepSettings
from pipelines.steps import Steps, part_schema, settled
from pipelines.storage import Storage


def is_committed(storage: Storage, shard: Shard, work: Work) -> bool:
    """Whether this run has nothing to do for the shard any more: its part stands, or holds what this retry merged."""
    if work.retry is None:
        return storage.exists(f"data/{shard.part_name}")
    try:
        return read_part(storage, shard.part_name).footer.retry_by(work.run_id) is not None
    except PartDamaged:
        return False  # `merge` says so


def failed_rows(storage: Storage, shard: Shard, work: Work) -> pa.Array | None:
    """Ids of the input's rows that a retry runs again; None when this run has merged the shard. Raises ShardError."""
    assert work.retry is not None
    standing = _standing(storage, shard, ["row_id", "error_code"])
    if standing.part.footer.retry_by(work.run_id):
        return None
    codes = standing.rows["error_code"]
    wanted = work.retry.error_codes
    matching = (
        pc.is_valid(codes) if wanted is None else pc.is_in(codes, value_set=pa.array(wanted, pa.string()))
    )
    return input_rows(standing.rows["row_id"].filter(matching)).unique()


def merge(
    storage: Storage, parcel: Parcel, answers: pa.Table, steps: Steps, work: Work, provenance: Provenance
) -> Footer:
    """Put what the steps make of the answers in place of the rows that are still failed; the footer that stands
    afterwards.

    Raises ShardError when the part is gone or damaged: a merge never makes a part.
    """
    assert work.retry is not None
    retry, began = work.retry, time.monotonic()

    def merged(standing: Standing) -> tuple[pa.Table, Footer] | None:
        before = standing.part.footer
        if before.retry_by(work.run_id):
            return None
        failed = _failed(standing.rows)
        records, counts = steps.run(_of_rows(answers, failed))
        again, became = _replacing(failed, records)
        new = settled(became)
        rows = _replaced(standing.rows, again, new, parcel.shard, part_schema(work))
        retried = replace(
            count(parcel, records, new, counts, work.sampling),
            rows_read=len(again),
            rows_filtered=0,
            rows_in=len(again),
            rows_added=count_rows(became) - len(again),
            rows_dropped=count_rows(became) - count_rows(new),
            commit_s=time.monotonic() - began,
        )
        return rows, replace(
            before,
            format_version=FORMAT_VERSION,
            stats=recount(before.stats, retried, rows),
            retries=(
                *before.retries,
                Retried(fingerprint=retry.fingerprint, stats=retried, provenance=provenance),
            ),
        )

    return rewrite(storage, parcel.shard, merged, work.output, work.steps)


def rewrite(
    storage: Storage,
    shard: Shard,
    change: Callable[[Standing], tuple[pa.Table, Footer] | None],
    output: OutputSettings,
    steps: Sequence[StepSettings],
) -> Footer:
    """Put other rows in place of a part's, by compare-and-swap; the footer that stands afterwards.

    `change` gets the part with its failed rows, and gives all rows of the new one and its footer, or None to leave the
    part as it is. It is asked again when somebody else has changed the part meanwhile. Raises ShardError when the part is
    gone or damaged, or the new books do not balance.
    """
    name = f"data/{shard.part_name}"
    while True:  # each refusal below means that somebody else's rewriting went through
        standing = _standing(storage, shard)
        before = standing.part.footer
        changed = change(standing)
        if changed is None:
            return before
        rows, after = changed
        if not after.stats.balanced:
            raise ShardError(f"the books of shard {shard.id} do not balance after a merge: {after.stats}")
        data, after = build_part(storage, rows, after, output)
        keep_keys(storage, rows, after, steps)
        if storage.replace(name, data, standing.version):
            break
    if after.errors_object:
        _keep_errors(storage, shard, after.errors_object, rows, output)
    if before.errors_object:
        storage.delete(before.errors_object)
    return after


@dataclass(frozen=True)
class Standing:
    """A part as one read found it, with its failed rows wherever they are."""

    part: Part
    version: str
    rows: pa.Table


def _standing(storage: Storage, shard: Shard, columns: list[str] | None = None) -> Standing:
    name = f"data/{shard.part_name}"
    where = storage.url(name)
    while True:
        found = storage.read_versioned(name)
        if found is None:
            raise ShardError(f"{where} is gone; `dray resume` makes it anew")
        data, version = found
        try:
            part = part_of(pa.BufferReader(data), shard.part_name, where)
            rows = _table(data, columns, where)
            errors_object = part.footer.errors_object
            if errors_object:
                failed = storage.read_versioned(errors_object)
                if failed is None:
                    if storage.info(name).version != version:
                        continue  # merged meanwhile, and its failed rows are elsewhere now
                    raise PartDamaged(f"{where}: its failed rows, {errors_object}, are gone")
                rows = pa.concat_tables([rows, _table(failed[0], columns, storage.url(errors_object))])
        except PartDamaged as error:
            # One part's, not the whole retry's.
            raise ShardError(f"{error}; `dray verify --deep --repair` moves it away") from error
        return Standing(part, version, rows)


def _table(data: bytes, columns: list[str] | None, where: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(data), columns=columns).replace_schema_metadata(None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise_if_damaged(error, where)
        raise


def _failed(standing: pa.Table) -> pa.ChunkedArray:
    """Ids of the rows that nobody has answered meanwhile."""
    return standing["row_id"].filter(pc.is_valid(standing["error_code"]))


def _of_rows(answers: pa.Table, failed: pa.ChunkedArray) -> pa.Table:
    """The answers to the input's rows that the `failed` ones are, or are elements of."""
    wanted = input_rows(failed).unique()
    return answers.filter(pc.is_in(input_rows(answers["row_id"]), value_set=wanted))


def _replacing(failed: pa.ChunkedArray, records: pa.Table) -> tuple[pa.Array, pa.Table]:
    """(ids of the failed rows of which something has become now, these records): of an element that the new list does
    not have, or whose list has come to nothing, nothing has."""
    known = set(failed.to_pylist())
    distinct = records["row_id"].unique()
    of = {
        row_id: next((one for one in (row_id, *rows_above(row_id)) if one in known), None)
        for row_id in distinct.to_pylist()
    }
    mine = pa.array([row_id for row_id, one in of.items() if one is not None], pa.string())
    again = pa.array(sorted({one for one in of.values() if one is not None}), pa.string())
    return again, records.filter(pc.is_in(records["row_id"], value_set=mine))


def _replaced(
    standing: pa.Table, again: pa.Array, new: pa.Table, shard: Shard, schema: pa.Schema
) -> pa.Table:
    """All rows of the shard after the merge, in input order: `new` in the places of the rows `again`."""
    if standing.column_names != schema.names:
        raise ShardError(f"{shard.part_name} has other columns than this job's: {standing.column_names}")
    kept = standing.filter(pc.invert(pc.is_in(standing["row_id"], value_set=again)))
    # Parquet gives some types back as others (seconds as milliseconds): the part's schema stays what it was.
    rows = pa.concat_tables([kept.cast(schema), new]).unify_dictionaries()
    keys = places(rows["row_id"], shard).append_column("sample_index", rows["sample_index"])
    if keys["span"].null_count:
        raise ShardError(f"{shard.part_name} holds rows of another shard; see `dray verify --deep --repair`")
    return rows.take(pc.sort_indices(keys, sort_keys=RECORD_ORDER))


def _keep_errors(storage: Storage, shard: Shard, name: str, rows: pa.Table, output: OutputSettings) -> None:
    """See that the failed rows are still where the part that stands says.

    Until then nothing referred to them: a driver that finishes, while this merge is the last of a killed one, clears
    such objects away.
    """
    if not storage.exists(name) and read_part(storage, shard.part_name).footer.errors_object == name:
        storage.write(name, to_parquet(rows.filter(pc.is_valid(rows["error_code"])), output.compression))
