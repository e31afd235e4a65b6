"""A shard's records: its input's columns beside the answers, one column or more for each generation."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.answer_columns import Answers, answer_columns, parsed, prompt_tokens
from pipelines.answer_parsers import Says
from pipelines.ask_settings import AskStep
from pipelines.contracts import Work, carried_columns, result_schema, unpack
from pipelines.generations import Generation
from pipelines.images import digests_of
from pipelines.messages import conversations
from pipelines.seeds import row_seed
from pipelines.shard_stats import Counts
from pipelines.stage import Parcel
from pipelines.steps import is_good


def records_of(parcel: Parcel, generation: Generation, says: Says) -> tuple[pa.Table, Counts]:
    """(the shard's records with the answers of this generation; the counts of a step that asks)."""
    if generation.step is None:
        return build_result(parcel, generation.work, says), {}
    records, counts = _with_answers(parcel, generation.step, says, generation.conversation)
    return records, {generation.name: counts}


def _with_answers(
    parcel: Parcel, step: AskStep, says: Says, conversation: str | None
) -> tuple[pa.Table, dict[str, int]]:
    """The records that the parcel has as rows, and behind their columns a later generation's.

    Its prompts are those of the good records, in their order, once for each view of them (`pipelines.judge.views`).
    """
    generations, prompts = parcel.generations, parcel.prompts
    assert generations is not None
    assert prompts is not None
    records = unpack(parcel.rows) if isinstance(parcel.rows, bytes) else parcel.rows
    assert records is not None
    asked = np.flatnonzero(is_good(records).to_numpy())
    answers = Answers(prompts, generations, len(asked))
    place = np.full(len(records), -1)
    place[asked] = np.arange(len(asked))
    index = pa.array(place, mask=place < 0)
    for name in ("error_code", "error_message"):
        at = records.column_names.index(name)
        values = pc.coalesce(records[name], answers.errors[name].take(index))
        records = records.set_column(at, records.schema.field(at), values)
    columns = answer_columns(step, answers, says)
    for suffix, values in columns.items():
        records = records.append_column(f"{step.column}{suffix}", values.take(index))
    if conversation is not None:
        asked_of = prompts["messages"].take(index)
        records = records.append_column(conversation, conversations(asked_of, records[step.column]))
    failed = len(asked) - answers.errors["error_code"].null_count
    reasoning = columns.get("_reasoning_tokens")
    return records, {
        "in": len(asked),
        "out": len(asked) - failed,
        "dropped": 0,
        "failed": failed,
        "prompt_tokens": pc.sum(answers.prompt_tokens).as_py() or 0,
        "completion_tokens": pc.sum(answers.completion_tokens).as_py() or 0,
        "cached_tokens": pc.sum(answers.cached_tokens).as_py() or 0,
        **({} if reasoning is None else {"reasoning_tokens": pc.sum(reasoning).as_py() or 0}),
    }


def build_result(parcel: Parcel, work: Work, says: Says) -> pa.Table:
    """The part's table in `result_schema`: input rows in order, each once per sample."""
    generations, prompts = parcel.generations, parcel.prompts
    assert generations is not None
    assert prompts is not None
    rows = unpack(parcel.rows) if isinstance(parcel.rows, bytes) else parcel.rows
    assert rows is not None
    prompted = work.prompt is not None
    schema = result_schema(work.input_schema, work.output, work.sampling, prompted=prompted)
    index = generations["row"]
    # By place: the carried columns, then the row id; the input may have a column of that name, to be renamed.
    columns: dict[str, Any] = {
        work.output.rename.get(name, name): rows.column(place).take(index)
        for place, name in enumerate(carried_columns(work.input_schema, work.output))
    }
    columns |= {
        "row_id": rows.column(rows.num_columns - 1).take(index),
        "sample_index": generations["sample_index"],
        "error_code": generations["error_code"],
        "error_message": generations["error_message"],
        "run_id": pa.repeat(work.run_id, len(generations)),
    }
    if prompted:
        said = says(prompts, generations)
        columns |= {
            "generated_text": said.text,
            **said.beside,
            "finish_reason": generations["finish_reason"],
            "prompt_tokens": prompt_tokens(prompts, generations),
            "completion_tokens": pc.list_value_length(generations["token_ids"]),
            "cached_tokens": generations["cached_tokens"],
        }
    if work.output.provenance:
        columns |= _provenance(
            columns["row_id"], prompts.select(["token_ids", "images", "seed"]).take(index), work
        )
    if work.sampling.logprobs is not None:  # else the names may be input columns'
        columns["logprobs"] = generations["logprobs"]
    if work.sampling.output_schema is not None:
        columns["parsed"] = parsed(columns["generated_text"], work.sampling)
    if work.output.conversation is not None:
        asked = prompts["messages"].take(index)
        columns[work.output.conversation] = conversations(asked, columns["generated_text"])
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _provenance(row_ids: pa.ChunkedArray, prompts: pa.Table, work: Work) -> dict[str, Any]:
    """`PROVENANCE_FIELDS` of each record."""
    model, seed = work.model, work.sampling.seed
    seeds = [None if seed is None else row_seed(seed, row) for row in row_ids.to_pylist()]
    name = os.path.basename(model.source) if os.path.isabs(model.source) else model.source
    hashes = [
        None
        if ids.values is None
        else hashlib.sha256(ids.values.to_numpy().astype("<i4").tobytes() + digests_of(images)).hexdigest()
        for ids, images in zip(prompts["token_ids"], prompts["images"], strict=True)
    ]
    return {
        "model": pa.repeat(name, len(row_ids)),
        "model_revision": pa.array([model.revision] * len(row_ids), pa.string()),
        "prompt_sha256": pa.array(hashes, pa.string()),
        "seed": pc.coalesce(prompts["seed"], pa.array(seeds, pa.int64())),
    }
