"""What becomes of a shard's answers before they are written: the job's `steps`, record by record.

    answers ─► parse ─► map ─► filter ─► select ─► explode ─► gather ─► the part's rows

A record is one sample of one row. Each step sees the records that are still good, and adds columns to them, drops some,
fails some, puts several in their places, which are rows of their own, or one record in the place of all of a row; a failed
or dropped record keeps what it has and goes past the rest. The books of each step balance: in + added = out + dropped +
failed + gathered. At the end a row has failed when none of its records is good and one has failed. Steps that ask a model
are no steps here: each begins another run of steps, on the answers of another generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.code import load_function
from pipelines.contracts import Work, result_schema
from pipelines.errors import RowError
from pipelines.filter import compile_filter
from pipelines.lists import Elements, explode, gather, with_ids
from pipelines.parse import parser
from pipelines.place import element_ranks, has_elements, input_rows
from pipelines.shard_stats import Counts
from pipelines.step_settings import (
    ExplodeStep,
    FilterStep,
    GatherStep,
    MapStep,
    ParseStep,
    SelectStep,
    StepSettings,
    arrow_type,
    step_names,
)
from pipelines.template import one_line
from pipelines.typed_columns import typed_columns
from pipelines.values import records


@dataclass(frozen=True)
class Verdict:
    """What a step makes of some records: one value each in `added`; which are dropped, and which fail of what.

    `elements`: what stands in the places of the others, where that is not they themselves. `gathered`: those whose values
    another record has now, with which all of its row of the input is one record; None where the step gathers none.
    """

    added: Mapping[str, pa.Array] = field(default_factory=dict)
    dropped: Sequence[int] = ()
    failed: Mapping[int, RowError] = field(default_factory=dict)
    elements: Elements | None = None
    gathered: Sequence[int] | None = None


class Step(Protocol):
    def __call__(self, good: pa.Table) -> Verdict: ...


class Steps:
    """Some consecutive steps of a job, ready to run. `folders` are the user's own, for the functions of `map` steps.

    Raises SpecError for a function that cannot be imported.
    """

    def __init__(
        self, settings: Sequence[StepSettings], folders: Sequence[str] = (), names: Sequence[str] = ()
    ) -> None:
        self._settings = settings
        self._names = names or step_names(tuple(settings))
        self._steps = [
            _ready(step, f"steps.{name}", folders) for step, name in zip(settings, self._names, strict=True)
        ]

    def run(self, records: pa.Table) -> tuple[pa.Table, Counts]:
        """(all records in their order, with the columns of these steps behind theirs; each step's counts).

        Failed and dropped records stay in their places: `settled` takes them out. Raises SpecError where a condition
        meets other types than it can compare.
        """
        if not self._steps:
            return records, {}
        if DROPPED not in records.column_names:
            records = records.append_column(DROPPED, pa.repeat(False, len(records)))
        whole = with_steps(records.schema, self._settings)
        records = records.append_column(_PLACE, pa.array(np.arange(len(records))))
        live = is_good(records)
        good, aside = records.filter(live), [records.filter(pc.invert(live))]
        counts: Counts = {}
        ranked = any(step.explode for step in self._settings)
        for name, step in zip(self._names, self._steps, strict=True):
            verdict = step(good)
            there = len(good)
            aside.append(_failed(good, verdict.failed))
            for column, values in verdict.added.items():
                good = good.append_column(column, values)
            gone = [*verdict.dropped, *(verdict.gathered or ())]
            aside.append(_with(good.take(gone or _NONE), DROPPED, True))
            good = (
                verdict.elements.records(good) if verdict.elements else good.filter(_staying(verdict, there))
            )
            counts[name] = {
                "in": there,
                "out": len(good),
                "dropped": len(verdict.dropped),
                "failed": len(verdict.failed),
            }
            if verdict.elements:
                counts[name]["added"] = len(good) + len(verdict.dropped) - there
            if verdict.gathered is not None:
                counts[name]["gathered"] = len(verdict.gathered)
                good = with_ids(good, input_rows(good["row_id"]))
                aside = [_beside(good, aside, ranked=ranked)]
        together = _in_order([good, *aside], ranked=ranked)
        return together.select(whole.names).cast(whole), counts


#: A record's place among the answers, its rank among the elements of one record, and whether a step has dropped it; no
#: column of a job has a name with a blank at its end.
_PLACE, _ELEMENT = "place ", "element "
DROPPED = "dropped "
_NONE = pa.array([], pa.int64())


def is_good(records: pa.Table) -> pa.ChunkedArray:
    """Which records have neither failed nor been dropped."""
    good = pc.is_null(records["error_code"])
    return pc.and_not(good, records[DROPPED]) if DROPPED in records.column_names else good


def settled(records: pa.Table) -> pa.Table:
    """The records to write: without those dropped, without the failed ones of rows that have a good one or elements, and
    without all but the first of the others."""
    kept = records
    if DROPPED in records.column_names:
        gone = pc.or_(records[DROPPED], has_elements(records["row_id"]))
        kept = records.filter(pc.invert(gone)).drop_columns([DROPPED])
    if kept["error_code"].null_count == len(kept):
        return kept
    errors = list(zip(kept["row_id"].to_pylist(), kept["error_code"].to_pylist(), strict=True))
    told = {row for row, code in errors if code is None}
    keep = []
    for row, code in errors:
        keep.append(code is None or row not in told)
        told.add(row)
    return kept.filter(pa.array(keep, pa.bool_()))


def with_steps(schema: pa.Schema, steps: Sequence[StepSettings]) -> pa.Schema:
    """The schema of the answers, and behind it the columns of all steps."""
    return pa.schema([*schema, *(column for columns in added_by(schema, steps) for column in columns)])


def added_by(schema: pa.Schema, steps: Sequence[StepSettings]) -> list[pa.Schema]:
    """The columns that each step adds. `schema`: of the answers."""
    added = []
    for step in steps:
        added.append(step.adds(schema))
        schema = pa.schema([*schema, *added[-1]])
    return added


def part_schema(work: Work) -> pa.Schema:
    """The explicit schema of every part of a job: the answers' columns, and behind them those of its steps."""
    return with_steps(answers_schema(work), work.steps)


def answers_schema(work: Work) -> pa.Schema:
    """Of the job's answers, before any step."""
    prompted = work.prompt is not None
    return result_schema(work.input_schema, work.output, work.sampling, prompted=prompted)


def _staying(verdict: Verdict, there: int) -> pa.Array:
    """Which of so many records neither fail nor are dropped."""
    stays = np.ones(there, bool)
    stays[[*verdict.failed, *verdict.dropped, *(verdict.gathered or ())]] = False
    return pa.array(stays)


def _beside(gathered: pa.Table, aside: Sequence[pa.Table], *, ranked: bool) -> pa.Table:
    """What has failed or was dropped before a row of the input became one record: no element any more, and where there is
    such a record, nothing that its row could have failed of."""
    records = _in_order(aside, ranked=ranked)
    records = with_ids(records, input_rows(records["row_id"]))
    past = pc.is_in(records["row_id"], value_set=gathered["row_id"].combine_chunks())
    place = records.column_names.index(DROPPED)
    return records.set_column(place, DROPPED, pc.or_(records[DROPPED], past))


def _in_order(tables: Sequence[pa.Table], *, ranked: bool) -> pa.Table:
    """The records in the places of those that they were; where some are `ranked`, as elements that one of these steps has made,
    elements of one in the order of its lists."""
    records = pa.concat_tables(tables, promote_options="default")
    if not ranked:
        return records.sort_by(_PLACE)
    ranks = element_ranks(records["row_id"])
    order = [(_PLACE, "ascending"), (_ELEMENT, "ascending")]
    return records.append_column(_ELEMENT, ranks).sort_by(order).drop_columns([_ELEMENT])


def _failed(good: pa.Table, failed: Mapping[int, RowError]) -> pa.Table:
    """The records that fail, with their errors."""
    table = good.take(list(failed) or _NONE)
    table = _with(table, "error_code", [error.code for error in failed.values()])
    return _with(table, "error_message", [str(error) for error in failed.values()])


def _with(table: pa.Table, column: str, values: Any) -> pa.Table:
    """The table with other values in a column: a list, or one value for all."""
    place = table.column_names.index(column)
    type_ = table.schema.field(place).type
    array = pa.array(values if isinstance(values, list) else [values] * len(table), type_)
    return table.set_column(place, table.schema.field(place), array)


# ── The kinds ────────────────────────────────────────────────────────────────────────────────────────────────────


def _ready(step: StepSettings, key: str, folders: Sequence[str]) -> Step:
    if step.parse is not None:
        return _parse(step.parse)
    if step.map is not None:
        return _map(step.map, key, folders)
    if step.filter is not None:
        return _filter(step.filter, key)
    if step.dedup is not None:
        return lambda good: (
            Verdict()
        )  # needs the other shards: the driver's, once all parts stand (`jobs.dedup`)
    if step.explode is not None:
        return _explode(step.explode)
    if step.gather is not None:
        return _gather(step.gather)
    assert step.select is not None  # StepSettings has exactly one kind
    return _select(step.select)


def _parse(step: ParseStep) -> Step:
    read = parser(step)
    types = {name: arrow_type(kind) for name, kind in step.adds.items()}

    def run(good: pa.Table) -> Verdict:
        outcomes = [
            RowError("parse_error", f"column {step.column!r} is null") if text is None else read(text)
            for text in good[step.column].to_pylist()
        ]
        added, errors = typed_columns(outcomes, types, "parse_error")
        if step.on_error == "fail":
            return Verdict(added, failed=errors)
        return Verdict(added, dropped=list(errors) if step.on_error == "drop" else ())

    return run


def _map(step: MapStep, key: str, folders: Sequence[str]) -> Step:
    function = load_function(step.function, folders, f"{key}.function")
    types = {name: arrow_type(kind) for name, kind in step.adds.items()}

    def call(record: dict[str, Any] | RowError) -> Mapping[str, Any] | RowError:
        if isinstance(record, RowError):
            return record
        try:
            given = function(record)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever user code raises is its record's error
            return RowError("step_error", f"{step.function}: {one_line(error)}")
        if not isinstance(given, Mapping) or given.keys() != types.keys():
            what = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            return RowError(
                "step_error", f"{step.function} returned {what}, not a dict with {', '.join(types)}"
            )
        return given

    def run(good: pa.Table) -> Verdict:
        hidden = (_PLACE, DROPPED, "error_code", "error_message")
        seen = [name for name in good.column_names if name not in hidden]
        outcomes = [call(record) for record in records(good, seen)]
        added, errors = typed_columns(outcomes, types, "step_error")
        return Verdict(added, failed=errors)

    return run


def _filter(step: FilterStep, key: str) -> Step:
    condition = compile_filter(step.where, f"{key}.where")

    def run(good: pa.Table) -> Verdict:
        kept = condition.mask(good)
        return Verdict(dropped=np.flatnonzero(pc.invert(kept).to_numpy(zero_copy_only=False)).tolist())

    return run


def _select(step: SelectStep) -> Step:
    sign = -1.0 if step.order == "largest" else 1.0

    def run(good: pa.Table) -> Verdict:
        values = (
            sign * pc.cast(good[step.by], pa.float64(), safe=False).to_numpy()
        )  # null: NaN, which sorts last
        rows = input_rows(good["row_id"]).combine_chunks().dictionary_encode().indices.to_numpy()
        order = np.lexsort((values, rows))  # stable: of equal values the first record comes first
        sorted_rows = rows[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_rows, sorted_rows)
        return Verdict(dropped=np.sort(order[rank >= step.keep]).tolist())

    return run


def _explode(step: ExplodeStep) -> Step:
    def run(good: pa.Table) -> Verdict:
        elements, empty = explode(good, step)
        return Verdict(dropped=empty, elements=elements)

    return run


def _gather(step: GatherStep) -> Step:
    def run(good: pa.Table) -> Verdict:
        lists, others = gather(good, step)
        return Verdict(lists, gathered=others)

    return run
