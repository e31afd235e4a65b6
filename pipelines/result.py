"""A shard's records: its input's columns beside the answers, one column or more for each generation."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ask_settings import AskStep, GenerateStep, JudgeStep
from pipelines.contracts import Counts, Work, result_schema, unpack
from pipelines.detokenize import Detokenizer
from pipelines.generations import Generation
from pipelines.judge import ruling
from pipelines.output_schema import Checker
from pipelines.seeds import row_seed
from pipelines.settings import SamplingSettings
from pipelines.stage import Parcel
from pipelines.step_settings import arrow_type
from pipelines.steps import is_good


def records_of(parcel: Parcel, generation: Generation, detokenizer: Detokenizer) -> tuple[pa.Table, Counts]:
    """(the shard's records with the answers of this generation; the counts of a step that asks)."""
    if generation.step is None:
        return build_result(parcel, generation.work, detokenizer), {}
    records, counts = _with_answers(parcel, generation.step, detokenizer)
    return records, {generation.name: counts}


def _with_answers(parcel: Parcel, step: AskStep, detokenizer: Detokenizer) -> tuple[pa.Table, dict[str, int]]:
    """The records that the parcel has as rows, and behind their columns a later generation's.

    Its prompts are those of the good records, in their order, once for each view of them (`pipelines.judge.views`).
    """
    generations, prompts = parcel.generations, parcel.prompts
    assert generations is not None
    assert prompts is not None
    records = unpack(parcel.rows) if isinstance(parcel.rows, bytes) else parcel.rows
    assert records is not None
    asked = np.flatnonzero(is_good(records).to_numpy())
    answers = _Answers(prompts, generations, len(asked))
    place = np.full(len(records), -1)
    place[asked] = np.arange(len(asked))
    index = pa.array(place, mask=place < 0)
    for name in ("error_code", "error_message"):
        at = records.column_names.index(name)
        values = pc.coalesce(records[name], answers.errors[name].take(index))
        records = records.set_column(at, records.schema.field(at), values)
    texts = _texts(prompts["token_ids"], generations, detokenizer)
    for suffix, values in _columns(step, texts, answers).items():
        records = records.append_column(f"{step.column}{suffix}", values.take(index))
    failed = len(asked) - answers.errors["error_code"].null_count
    return records, {
        "in": len(asked),
        "out": len(asked) - failed,
        "dropped": 0,
        "failed": failed,
        "prompt_tokens": pc.sum(answers.prompt_tokens).as_py() or 0,
        "completion_tokens": pc.sum(answers.completion_tokens).as_py() or 0,
        "cached_tokens": pc.sum(answers.cached_tokens).as_py() or 0,
    }


def _columns(step: AskStep, texts: pa.ChunkedArray, answers: _Answers) -> dict[str, Any]:
    """By suffix the columns of a step that asks, for each of the records that it has asked about."""
    tokens = {"_prompt_tokens": answers.prompt_tokens, "_completion_tokens": answers.completion_tokens}
    if isinstance(step, JudgeStep):
        return {**_rulings(step, texts, answers), **tokens}
    assert isinstance(step, GenerateStep)  # which has one answer for each record
    columns = {"": texts, "_finish_reason": answers.generations["finish_reason"], **tokens}
    if step.sampling.output_schema is not None:
        columns["_parsed"] = _parsed(texts, step.sampling)
    return columns


def _rulings(step: JudgeStep, texts: pa.ChunkedArray, answers: _Answers) -> dict[str, Any]:
    said: dict[int, list[list[str]]] = {}
    for record, view, text in zip(
        answers.record.tolist(), answers.view.tolist(), texts.to_pylist(), strict=True
    ):
        said.setdefault(record, [[] for _ in range(answers.views)])[view].append(text)
    failed = answers.errors["error_code"].is_valid().to_pylist()
    rulings = [
        (None, None) if failed[record] else ruling(step, said[record]) for record in range(answers.records)
    ]
    types = [arrow_type(kind) for kind in step.adds.values()]
    verdicts, votes = ([one[column] for one in rulings] for column in (0, 1))
    return {"": pa.array(verdicts, types[0]), "_votes": pa.array(votes, types[1])}


class _Answers:
    """The answers to a step's requests, by the records that it has asked about: `views` requests for each of them, all
    of one view after those of the other, with one or more samples each."""

    def __init__(self, prompts: pa.Table, generations: pa.Table, records: int) -> None:
        self.generations, self.records = generations, records
        self.views = len(prompts) // records if records else 0
        request = generations["row"].to_numpy()
        self.record = request % max(records, 1)
        """Of each sample."""
        self.view = request // max(records, 1)
        answered = generations["token_ids"].is_valid().to_numpy()
        first = answered & (generations["sample_index"].to_numpy() == 0)
        prompt_tokens = pc.list_value_length(prompts["token_ids"]).take(generations["row"])
        self.prompt_tokens = self._sum(prompt_tokens, first)
        self.completion_tokens = self._sum(pc.list_value_length(generations["token_ids"]), answered)
        self.cached_tokens = self._sum(generations["cached_tokens"], first)

    def _sum(self, values: pa.ChunkedArray, where: npt.NDArray[np.bool_]) -> pa.Array:
        """For each record the sum over those of its samples; null where there are none."""
        weights = values.filter(pa.array(where)).to_numpy()
        sums = np.bincount(self.record[where], weights, self.records).astype(np.int32)
        none = np.bincount(self.record[where], minlength=self.records) == 0
        return pa.array(sums, mask=none)

    @cached_property
    def errors(self) -> dict[str, pa.Array]:
        """`error_code` and `error_message` of each record: of the first of its requests that has failed."""
        failed = np.flatnonzero(self.generations["error_code"].is_valid().to_numpy())
        first = np.full(self.records, -1)
        first[self.record[failed[::-1]]] = failed[::-1]
        index = pa.array(first, mask=first < 0)
        return {name: self.generations[name].take(index) for name in ("error_code", "error_message")}


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
    if work.output.provenance:
        columns |= _provenance(columns["row_id"], prompt_ids.take(index), work)
    if work.sampling.logprobs is not None:  # else the names may be input columns'
        columns["logprobs"] = generations["logprobs"]
    if work.sampling.output_schema is not None:
        columns["parsed"] = _parsed(columns["generated_text"], work.sampling)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _provenance(row_ids: pa.ChunkedArray, prompt_ids: pa.ChunkedArray, work: Work) -> dict[str, Any]:
    """`PROVENANCE_FIELDS` of each record."""
    model, seed = work.model, work.sampling.seed
    name = os.path.basename(model.source) if os.path.isabs(model.source) else model.source
    hashes = [
        None
        if ids.values is None
        else hashlib.sha256(ids.values.to_numpy().astype("<i4").tobytes()).hexdigest()
        for ids in prompt_ids
    ]
    return {
        "model": pa.repeat(name, len(row_ids)),
        "model_revision": pa.array([model.revision] * len(row_ids), pa.string()),
        "prompt_sha256": pa.array(hashes, pa.string()),
        "seed": pa.array(
            [None if seed is None else row_seed(seed, row) for row in row_ids.to_pylist()], pa.int64()
        ),
    }


def _parsed(texts: pa.ChunkedArray, sampling: SamplingSettings) -> pa.Array:
    return Checker(sampling).column(texts.to_pylist())


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
