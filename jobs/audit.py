"""Every row of an output against the footers and the plan: `dray verify --deep`.

A part is read whole and by itself, and forgotten: ids of different shards cannot be equal when each lies within its own
shard's spans and no two shards share a row of a file. So memory holds a few parts, however many rows there are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.books import Books, Fault, each
from jobs.fingerprint import output_schema_of, steps_of
from jobs.planning import Plan
from pipelines.contracts import Shard, Span, result_schema
from pipelines.counting import ANSWERED, COUNTED, SPENT, TALLIED, tally
from pipelines.errors import OutputError, PartDamaged
from pipelines.part import Footer, Part, body_digest, part_of, raise_if_damaged
from pipelines.place import RECORD_ORDER, depths, has_elements, places
from pipelines.settings import OutputSettings, SamplingSettings
from pipelines.steps import with_steps
from pipelines.storage import Storage
from pipelines.wording import first_line

#: Parts in memory at once.
_READERS = 4


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What reading all rows has shown."""

    faults: tuple[Fault, ...]
    without_digest: int
    """Parts that were written before footers held one: their rows were read, their bytes not compared."""


def audit(storage: Storage, plan: Plan, books: Books, identity: dict[str, Any]) -> Audit:
    """Read every part of the books, failed rows included. `identity`: what the output's fingerprint was taken of."""
    parts = {part.name: part for part in books.parts}
    filtered = "input.filter" in identity
    faults = list(_shared_rows(plan))
    without = 0
    for name, (footer, problems) in each(
        parts, lambda name: _audit_part(storage, parts[name], filtered), _READERS
    ):
        without += footer.digest is None
        faults += (Fault(name=f"data/{name}", text=f"data/{name}: {text}", movable=True) for text in problems)
    return Audit(faults=tuple(faults), without_digest=without)


def check_schemas(plan: Plan, books: Books, identity: dict[str, Any]) -> list[Fault]:
    """Parts whose schema is not the one that the plan and the spec give."""
    expected = _expected_schema(plan, identity)
    if expected is None and books.parts:
        expected = books.parts[0].schema
    return [
        Fault(
            name=f"data/{part.name}",
            text=f"data/{part.name}: has another schema than planned: {_difference(part.schema, expected)}",
            movable=True,
        )
        for part in books.parts
        if not part.schema.equals(expected)
    ]


def _expected_schema(plan: Plan, identity: dict[str, Any]) -> pa.Schema | None:
    """What a part's schema reads back as; None where the spec keeps a value of it in an environment variable."""
    prefix = "output.rename."
    rename = {key.removeprefix(prefix): value for key, value in identity.items() if key.startswith(prefix)}
    columns, conversation = identity["output.columns"], identity.get("output.conversation")
    sampling: dict[str, Any] = {
        name: identity.get(f"sampling.{name}")
        for name in ("logprobs", "reasoning_parser", "tool_call_parser")
    }
    if any(
        isinstance(value, dict) for value in (columns, conversation, *sampling.values(), *rename.values())
    ):
        return None
    answers = result_schema(
        plan.input_schema,
        OutputSettings(
            path="-",
            columns=columns,
            rename=rename,
            provenance=identity.get("output.provenance"),
            conversation=conversation,
        ),
        SamplingSettings(**sampling, output_schema=output_schema_of(identity)),
        prompted=any(key.startswith("prompt.") for key in identity),
    )
    schema = with_steps(answers, steps_of(identity))
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)  # Parquet gives some types back as others
    return pq.read_schema(pa.BufferReader(sink.getvalue())).remove_metadata()


def _difference(found: pa.Schema, expected: pa.Schema) -> str:
    """The first field in which they differ."""
    for one, other in itertools.zip_longest(found, expected):
        if one is None or other is None or not one.equals(other):
            return f"{one or 'nothing'}, planned is {other or 'nothing'}"
    return "order"


def _shared_rows(plan: Plan) -> Iterator[Fault]:
    """Rows that two shards would both read: then ids could collide. Planning makes no such plan."""
    spans = sorted(
        ((span.path, span.start, span.stop, shard) for shard in plan.shards for span in shard.spans),
        key=lambda item: item[:3],
    )
    for (path, _, stop, one), (next_path, start, _, other) in itertools.pairwise(spans):
        if path == next_path and start < stop:
            text = f"shards {one.id} and {other.id} both have row {start} of {path}: the plan is damaged"
            yield Fault(name=".dray/plan", text=text, movable=False)


# ── One part ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _audit_part(storage: Storage, part: Part, filtered: bool) -> tuple[Footer, list[str]]:
    name = f"data/{part.name}"
    try:
        data = storage.read(name)
        footer = part_of(pa.BufferReader(data), part.name, name).footer
    except FileNotFoundError:
        return part.footer, ["is gone since it was listed"]
    except OutputError as error:
        return part.footer, [str(error)]
    try:
        return footer, list(_part_problems(storage, data, footer, name, filtered))
    except FileNotFoundError:
        return footer, []  # its failed rows: the books say so
    except PartDamaged as error:
        return footer, [str(error)]
    except pa.ArrowException as error:  # columns of other types
        return footer, [f"its rows cannot be counted: {first_line(error)}"]


def _part_problems(storage: Storage, data: bytes, footer: Footer, name: str, filtered: bool) -> Iterable[str]:
    if footer.digest and body_digest(data) != footer.digest:
        yield "its bytes are not those that were written: their digest is not the one in the footer"
        return
    rows = _keys(data, name)
    failed_inline = len(rows) - rows["error_code"].null_count
    yield from _order_problems(rows, footer.shard)
    if footer.errors_object:
        errors = storage.read(footer.errors_object)
        if footer.errors_digest and hashlib.sha256(errors).hexdigest() != footer.errors_digest:
            yield f"its failed rows, {footer.errors_object}, are not those that were written"
            return
        failed = _keys(errors, footer.errors_object)
        if failed_inline:
            yield f"holds {failed_inline} failed rows, though those are in {footer.errors_object}"
        if failed["error_code"].null_count:
            yield f"{footer.errors_object} holds rows that have not failed"
        rows = pa.concat_tables([rows, failed])
    yield from _row_problems(rows, footer, filtered)


def _keys(data: bytes, where: str) -> pa.Table:
    """Decode every column of every row group, and keep those that are counted."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            kept = [*TALLIED, *(name for name in ANSWERED if name in file.schema_arrow.names)]
            groups = [file.read_row_group(i).select(kept) for i in range(file.num_row_groups)]
            return pa.concat_tables(groups) if groups else file.schema_arrow.empty_table().select(kept)
    except KeyError as error:
        raise PartDamaged(f"has no column {error}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise_if_damaged(error, where)
        raise


def _order_problems(rows: pa.Table, shard: Shard) -> Iterable[str]:
    keys = places(rows["row_id"], shard).append_column("sample_index", rows["sample_index"])
    if keys.sort_by(RECORD_ORDER) != keys:
        yield "its rows are not in input order"


def _row_problems(rows: pa.Table, footer: Footer, filtered: bool) -> Iterable[str]:
    """All rows of a shard: the right ones, each once, as often as the footer says."""
    shard, stats = footer.shard, footer.stats
    failed = pc.cast(pc.is_valid(rows["error_code"]), pa.int32())
    ids = (
        rows.select(["row_id", "sample_index"])
        .append_column("failed", failed)
        .group_by("row_id")
        .aggregate([("sample_index", "count"), ("sample_index", "max"), ("failed", "sum")])
    )
    distinct = rows.group_by(["row_id", "sample_index"]).aggregate([]).num_rows
    if distinct != len(rows):
        yield f"{len(rows) - distinct} keys (row_id, sample_index) occur twice"
    else:
        whole = pc.equal(pc.add(ids["sample_index_max"], 1), ids["sample_index_count"])
        if stats.steps:  # which may drop samples
            whole = pc.is_valid(whole)
        alone = pc.or_(pc.equal(ids["failed_sum"], 0), pc.equal(ids["sample_index_count"], 1))
        odd = ids.filter(pc.invert(pc.and_(whole, alone)))
        if len(odd):
            yield f"{len(odd)} rows lack a sample, or have failed and an answer, the first is {odd['row_id'][0]}"
    lists = ids.filter(has_elements(ids["row_id"]))
    if len(lists):
        yield f"{len(lists)} rows stand beside elements of their own lists, the first is {lists['row_id'][0]}"
    where = places(ids["row_id"], shard)
    explodes = sum("added" in counts for counts in stats.steps.values())
    strangers = ids.filter(pc.or_(pc.is_null(where["span"]), pc.greater(depths(ids["row_id"]), explodes)))
    if len(strangers):
        yield f"{len(strangers)} rows are not its shard's, the first is {strangers['row_id'][0]}"
    elif not filtered and not stats.rows_dropped:
        yield from _missing(where, shard.spans)
    if len(ids) + stats.rows_dropped != stats.rows:
        yield f"holds {len(ids)} different rows, its footer counts {stats.rows}, {stats.rows_dropped} of them dropped"
    counted = tally(rows)
    told = COUNTED if stats.steps else COUNTED + SPENT
    yield from (
        f"its rows come to {name} {getattr(counted, name)}, its footer says {getattr(stats, name)}"
        for name in told
        if getattr(counted, name) != getattr(stats, name)
    )


def _missing(where: pa.Table, spans: tuple[Span, ...]) -> Iterable[str]:
    """Spans of known rows that are not all there. `where`: one row for each id, all within their spans."""
    counts = where.group_by("span").aggregate([("position", "count_distinct")])
    found = dict(zip(counts["span"].to_pylist(), counts["position_count_distinct"].to_pylist(), strict=True))
    for number, span in enumerate(spans):
        lacking = span.stop - span.start - found.get(number, 0)
        if span.unit == "rows" and lacking:
            there = where.filter(pc.equal(where["span"], number))["position"].to_pylist()
            first = min(set(range(span.start, span.stop)) - set(there))
            yield f"{lacking} rows of {span.path} are missing, the first is row {first}"
