"""The first prompts of a job as the model will see them, and on request their answers. Writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.markup import escape

from jobs.cutting import cut_lazily
from jobs.in_process import answer_all, answered
from jobs.loading import LoadedJob
from jobs.proposal import check_images_folder, input_schema, work_of
from jobs.spec_columns import needed_columns
from pipelines.advance import Reading, row_of
from pipelines.answer_parsers import parser_fields
from pipelines.contracts import Shard, Work
from pipelines.dedup import duplicates
from pipelines.dedup_keys import make_keys
from pipelines.errors import InputError
from pipelines.listing import list_files
from pipelines.place import input_rows
from pipelines.prepare import Prepare
from pipelines.stage import Parcel
from pipelines.step_settings import dedup_step
from pipelines.steps import answers_schema, is_good, settled
from pipelines.tokenizer import load_tokenizer


def preview(job: LoadedJob, *, rows: int, generate: bool) -> list[dict[str, Any]]:
    """The first `rows` rows that pass the filter, through the job's own stages but without Ray.

    Each has `row_id`, `prompt` (the tokens as text, special tokens shown), `prompt_tokens`, `error_code` and
    `error_message`; a prompt with images how many, as `images`, whose own tokens only an engine knows; with `generate` also `answers`, a list of `generated_text`, `finish_reason` and `steps` (the columns
    that these add) per record that the steps have left, elements of its lists included.
    """
    check_images_folder(job.spec.input)
    files = list_files(job.spec.input, needed_columns(job.spec))
    work = work_of(job, input_schema(job.spec, files), fingerprint="", run_id="preview")
    parcel = _first_rows(Prepare(work), cut_lazily(files, rows), rows)
    tokenizer = load_tokenizer(job.spec.pools[0].model)
    assert parcel.prompts is not None
    seen = []
    images = pc.list_value_length(parcel.prompts["images"]).to_pylist()
    prompts = parcel.prompts.drop_columns(["images"])
    for row, count in zip(prompts.to_pylist(), images, strict=True):
        ids = row["token_ids"]
        seen.append(
            {
                "row_id": row_of(row["row_id"]),
                "prompt": None if ids is None else tokenizer.decode(ids),
                "prompt_tokens": None if ids is None else len(ids),
                **({"images": count} if count else {}),
                "error_code": row["error_code"],
                "error_message": row["error_message"],
            }
        )
    if generate:
        result = _without_duplicates(asyncio.run(_answered(parcel, work)), work)
        parts = [field.name for field in parser_fields(work.sampling)] if work.prompt else []
        shown = ("generated_text", *parts, "finish_reason", "error_code", "error_message")
        added = result.schema.names[len(answers_schema(work)) :]
        answers: dict[str, list[dict[str, Any]]] = {}
        for row_id, record in zip(input_rows(result["row_id"]).to_pylist(), result.to_pylist(), strict=True):
            answer = {name: record.get(name) for name in shown}
            answer["steps"] = {name: record[name] for name in added}
            answers.setdefault(row_id, []).append(answer)
        shown_rows = input_rows(pa.chunked_array([[row["row_id"] for row in seen]], pa.string()))
        for row, row_id in zip(seen, shown_rows.to_pylist(), strict=True):
            row["answers"] = answers.get(row_id, [])
    return seen


def _without_duplicates(result: pa.Table, work: Work) -> pa.Table:
    """The records that a `dedup` step leaves of these; other rows of the job may take more of them away."""
    step = dedup_step(work.steps)
    if step is None:
        return result
    good = np.flatnonzero(pc.is_null(result["error_code"]).to_numpy())
    stays = np.ones(len(result), bool)
    keys = make_keys(result, step).keys
    stays[good[duplicates(keys, np.zeros(len(keys), np.int32), step)]] = False
    return result.filter(pa.array(stays))


def _first_rows(prepare: Prepare, shards: Iterable[Shard], rows: int) -> Parcel:
    """The first `rows` rows of the shards that pass the filter, prepared, as one parcel."""
    parcels: list[Parcel] = []
    for shard in shards:
        parcels.append(prepare.shard(Parcel(shard=shard)))
        if sum(len(parcel.prompts or ()) for parcel in parcels) >= rows:
            break
    if not parcels:
        raise InputError("the input has no rows")
    records = pa.concat_tables([p.rows for p in parcels if isinstance(p.rows, pa.Table)])
    prompts = pa.concat_tables([p.prompts for p in parcels if p.prompts is not None])
    kept = rows
    if prepare.work.prompt is None:  # then only records that its first steps have left have a prompt
        asked = np.flatnonzero(is_good(records).to_numpy())
        kept = int(asked[rows]) if len(asked) > rows else len(records)
    return Parcel(shard=parcels[0].shard, rows=records.slice(0, kept), prompts=prompts.slice(0, rows))


async def _answered(parcel: Parcel, work: Work) -> pa.Table:
    """The records that the job would write of the parcel."""
    generation, parcel = await answer_all(parcel, work, answered)
    reading = Reading(generation)
    records, _ = reading.steps.run(reading.records(parcel)[0])
    return settled(records)


def render(seen: list[dict[str, Any]]) -> RenderableType:
    """Prompts and answers for the terminal."""
    lines: list[str] = []
    for row in seen:
        images = f", {row['images']} image{'s' * (row['images'] > 1)}" if row.get("images") else ""
        size = "" if row["prompt_tokens"] is None else f" [dim]({row['prompt_tokens']} tokens{images})[/]"
        lines.append(f"[bold]{escape(row['row_id'])}[/]{size}")
        if row["error_code"]:
            lines.append(f"  [red]{row['error_code']}[/]: {escape(row['error_message'])}")
        else:
            lines.append(escape(row["prompt"]))
        for answer in row.get("answers", ()):
            if answer.get("reasoning"):
                lines.append(f"  [dim]… {escape(answer['reasoning'])}[/]")
            if answer["generated_text"] is not None:
                lines.append(
                    f"  [green]→[/] {escape(answer['generated_text'])} [dim]({answer['finish_reason']})[/]"
                )
            lines += [
                f"  [green]→[/] {escape(call['name'])}({escape(call['arguments'])})"
                for call in answer.get("tool_calls") or ()
            ]
            if answer["error_code"] and not row["error_code"]:
                lines.append(f"    [red]{answer['error_code']}[/]: {escape(answer['error_message'])}")
            lines += [f"    {name}: {escape(repr(value))}" for name, value in answer["steps"].items()]
        lines.append("")
    return Group(*lines)
