"""A shard's result rows, and what there is to count about them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import ShardStats, Work, result_schema, unpack
from pipelines.detokenize import Detokenizer
from pipelines.histogram import Histogram
from pipelines.stage import Parcel


def build_result(parcel: Parcel, work: Work, detokenizer: Detokenizer) -> pa.Table:
    """The part's table in `result_schema`: input rows in order, each once per sample."""
    generations, prompts = parcel.generations, parcel.prompts
    assert generations is not None
    assert prompts is not None
    rows = unpack(parcel.rows) if isinstance(parcel.rows, bytes) else parcel.rows
    assert rows is not None
    schema = result_schema(work.input_schema, work.output, work.sampling)
    index = generations["row"]
    prompt_ids, output_ids = prompts["token_ids"], generations["token_ids"]
    carried = work.input_schema.names if work.output.columns == "all" else work.output.columns
    # By place: the input's columns, then the row id; the input may have a column of that name, to be renamed.
    columns: dict[str, Any] = {
        work.output.rename.get(name, name): rows.column(work.input_schema.get_field_index(name)).take(index)
        for name in carried
    }
    columns |= {
        "row_id": rows.column(rows.num_columns - 1).take(index),
        "sample_index": generations["sample_index"],
        "generated_text": _texts(prompt_ids, generations, detokenizer),
        "finish_reason": generations["finish_reason"],
        "prompt_tokens": pc.list_value_length(prompt_ids).take(index),
        "completion_tokens": pc.list_value_length(output_ids),
        "cached_tokens": generations["cached_tokens"],
        "error_code": generations["error_code"],
        "error_message": generations["error_message"],
        "run_id": pa.repeat(work.run_id, len(generations)),
    }
    if work.sampling.logprobs is not None:  # else the name may be an input column's
        columns["logprobs"] = generations["logprobs"]
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _texts(prompt_ids: pa.ChunkedArray, generations: pa.Table, detokenizer: Detokenizer) -> pa.ChunkedArray:
    """The text of each sample: the engine's where it had to detokenise, ours elsewhere, null for failed rows."""
    missing = pc.and_(generations["token_ids"].is_valid(), generations["text"].is_null())
    answers = generations.filter(missing)
    texts = detokenizer.texts(
        prompt_ids.take(answers["row"]).to_pylist(),
        answers["token_ids"].to_pylist(),
        answers["finish_reason"].to_pylist(),
    )
    engine_texts = generations["text"].cast(pa.string())
    return pc.replace_with_mask(engine_texts, missing.combine_chunks(), pa.array(texts, pa.string()))


def count(parcel: Parcel, result: pa.Table) -> ShardStats:
    """The shard's statistics, counted from the rows that will be written, not from what stages claimed."""
    ok = result.filter(pc.is_null(result["error_code"]))
    failed = result.filter(pc.is_valid(result["error_code"]))
    first = ok.filter(pc.equal(ok["sample_index"], 0))
    notes = parcel.notes
    return ShardStats(
        rows_read=notes["rows_read"],
        rows_filtered=notes["rows_filtered"],
        rows_in=len(parcel.prompts or ()),
        rows_ok=pc.count_distinct(ok["row_id"]).as_py(),
        rows_failed=pc.count_distinct(failed["row_id"]).as_py(),
        samples=len(ok),
        prompt_tokens=pc.sum(first["prompt_tokens"]).as_py() or 0,
        completion_tokens=pc.sum(ok["completion_tokens"]).as_py() or 0,
        cached_tokens=pc.sum(first["cached_tokens"]).as_py() or 0,
        prepare_s=notes["prepare_s"],
        queue_s=notes["queue_s"],
        generate_s=notes["generate_s"],
        preemptions=notes["preemptions"],
        engine_deaths=notes["engine_deaths"],
        error_codes=dict(Counter(failed["error_code"].to_pylist())),
        finish_reasons=dict(Counter(ok["finish_reason"].to_pylist())),
        latency_s=Histogram.from_dict(notes["latency_s"]),
        ttft_s=Histogram.from_dict(notes["ttft_s"]),
    )


def error_examples(result: pa.Table) -> dict[str, dict[str, str]]:
    """For each error code the first row that has it: `row_id` and `error_message`."""
    failed = result.filter(pc.is_valid(result["error_code"]))
    examples: dict[str, dict[str, str]] = {}
    for code in failed["error_code"].unique().to_pylist():
        row = failed.slice(pc.index(failed["error_code"], code).as_py(), 1).to_pylist()[0]
        examples[code] = {"row_id": row["row_id"], "error_message": row["error_message"]}
    return examples
