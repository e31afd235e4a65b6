"""What there is to count about a shard's result rows.

Rows are those of the input, or the elements that stand in their places after an `explode`; each has a `row_id`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import ANSWER_FIELDS
from pipelines.histogram import Histogram
from pipelines.place import has_elements, input_rows
from pipelines.settings import SamplingSettings
from pipelines.shard_stats import Counts, ShardStats
from pipelines.stage import Parcel

#: The columns that `tally` reads, and those that it reads where the job has a prompt of its own.
TALLIED = ("row_id", "sample_index", "error_code")
ANSWERED = tuple(field.name for field in ANSWER_FIELDS if field.name != "generated_text")
#: The statistics that the written rows themselves tell; the others are times and what was read.
COUNTED = ("rows_ok", "rows_failed", "samples", "error_codes")
#: What was spent on answers. The written rows tell it as well, unless steps have dropped or failed some of them.
SPENT = ("prompt_tokens", "completion_tokens", "cached_tokens", "finish_reasons")


def tally(rows: pa.Table) -> ShardStats:
    """`COUNTED` and `SPENT` on the job's own prompt, from all rows of a shard; `rows_in` is their number, nothing else is set."""
    ok = rows.filter(pc.is_null(rows["error_code"]))
    failed = rows.filter(pc.is_valid(rows["error_code"]))
    rows_ok, rows_failed = (pc.count_distinct(some["row_id"]).as_py() for some in (ok, failed))
    return ShardStats(
        rows_in=rows_ok + rows_failed,
        rows_ok=rows_ok,
        rows_failed=rows_failed,
        samples=len(ok),
        error_codes=dict(Counter(failed["error_code"].to_pylist())),
        **_spent(ok),
    )


def spent(records: pa.Table, steps: Counts, *, reasons: bool) -> dict[str, Any]:
    """`SPENT` and `reasoning_tokens`: on the records' own answers, and on what steps asked a model about them, whatever became of
    them. `reasons`: whether the own answers have that column, a name that an input's may have as well."""
    answers = distinct_answers(records)
    found = {
        **_spent(answers),
        "reasoning_tokens": (pc.sum(answers["reasoning_tokens"]).as_py() or 0) if reasons else 0,
    }
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"):
        found[name] += sum(step.get(name, 0) for step in steps.values())
    return found


def _spent(records: pa.Table) -> dict[str, Any]:
    """`SPENT` on the records' own answers; nothing where the job has no prompt of its own."""
    if not set(ANSWERED) <= set(records.column_names):
        return {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "finish_reasons": {}}
    answered = records.filter(pc.is_valid(records["completion_tokens"]))
    first = answered.filter(pc.equal(answered["sample_index"], 0))
    return {
        "prompt_tokens": pc.sum(first["prompt_tokens"]).as_py() or 0,
        "completion_tokens": pc.sum(answered["completion_tokens"]).as_py() or 0,
        "cached_tokens": pc.sum(first["cached_tokens"]).as_py() or 0,
        "finish_reasons": dict(Counter(answered["finish_reason"].to_pylist())),
    }


def distinct_answers(records: pa.Table) -> pa.Table:
    """One record of each answer, which the elements of a list have in common, also when they are gathered again."""
    rows = input_rows(records["row_id"])
    keys = pa.table({"row": rows, "sample": records["sample_index"], "place": np.arange(len(records))})
    return records.take(keys.group_by(["row", "sample"]).aggregate([("place", "min")])["place_min"].sort())


def count(
    parcel: Parcel, records: pa.Table, rows: pa.Table, steps: Counts, sampling: SamplingSettings
) -> ShardStats:
    """The statistics of a parcel: of the `rows` that will be written and of all the `records` that they were taken from,
    and of the `steps` since the last generation; not from what stages claimed. `sampling`: of the job's own answers."""
    notes, written = parcel.notes, tally(rows)
    every = {**notes.get("steps", {}), **steps}
    became = count_rows(records)
    return replace(
        written,
        **spent(records, every, reasons=sampling.reasoning_parser is not None),
        rows_dropped=became - written.rows_in,
        rows_added=became - pc.count_distinct(input_rows(records["row_id"])).as_py(),
        steps=every,
        rows_read=notes["rows_read"],
        rows_filtered=notes["rows_filtered"],
        rows_in=notes["rows_in"],
        prepare_s=notes["prepare_s"],
        queue_s=notes["queue_s"],
        generate_s=notes["generate_s"],
        preemptions=notes["preemptions"],
        rows_reused=notes["rows_reused"],
        tokens_reused=notes["tokens_reused"],
        repairs=notes["repairs"],
        repair_tokens=notes["repair_tokens"],
        engine_deaths=notes["engine_deaths"],
        latency_s=Histogram.from_dict(notes["latency_s"]),
        ttft_s=Histogram.from_dict(notes["ttft_s"]),
    )


def count_rows(records: pa.Table) -> int:
    """How many rows there are among the records, good, failed or dropped: a row that has elements is none."""
    ids = records["row_id"].unique()
    lists: int = pc.sum(has_elements(pa.chunked_array([ids]))).as_py() or 0
    return len(ids) - lists


def recount(standing: ShardStats, retried: ShardStats, rows: pa.Table) -> ShardStats:
    """A shard's statistics after a retry: `rows` counted anew, the work on `retried` added, what was read as it was."""
    counted = tally(rows)
    return replace(
        standing + retried,
        shards=standing.shards,
        rows_read=standing.rows_read,
        rows_filtered=standing.rows_filtered,
        rows_in=standing.rows_in,
        rows_added=standing.rows_added + retried.rows_added,
        rows_dropped=standing.rows_dropped + retried.rows_dropped,
        **{name: getattr(counted, name) for name in COUNTED},
    )


def error_examples(result: pa.Table) -> dict[str, dict[str, str]]:
    """For each error code the first row that has it: `row_id` and `error_message`."""
    failed = result.filter(pc.is_valid(result["error_code"]))
    examples: dict[str, dict[str, str]] = {}
    for code in failed["error_code"].unique().to_pylist():
        row = failed.slice(pc.index(failed["error_code"], code).as_py(), 1).to_pylist()[0]
        examples[code] = {"row_id": row["row_id"], "error_message": row["error_message"]}
    return examples
