"""The output of a batch job in OpenAI's format: a line for each request, those that failed in a file of their own.

    <out>/data/part-… ─ in the order of the input, a few rows at a time ─► results.jsonl, results.errors.jsonl

Sources: https://platform.openai.com/docs/api-reference/batch/request-output and those of the three endpoints' bodies; vLLM
0.32's `ChatMessage` for `reasoning`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.books import SUCCESS, fold
from jobs.inspect import opened
from jobs.loading import load
from jobs.openai_body import CHAT, EMBEDDINGS, ENDPOINTS
from jobs.openai_job import VECTOR
from jobs.output import read_spec
from jobs.planning import load_plan
from pipelines.errors import OutputError
from pipelines.part import Part, raise_if_damaged
from pipelines.storage import Storage, locate

_BATCH_ROWS = 256
#: error_code → HTTP status; the others are the request's own fault: 400.
_STATUS = {
    "engine_crash": 500,
    "prompt_crash": 500,
    "invalid_output": 500,
    "request_timeout": 504,
}
#: Errors that are about the prompt, which the error's `param` then names.
_OF_PROMPT = frozenset(
    {
        "missing_value",
        "invalid_utf8",
        "prompt_error",
        "bad_image",
        "empty_prompt",
        "prompt_too_long",
        "prompt_crash",
    }
)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many requests have an answer, and how many an error."""

    completed: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """What is told of requests that were never answered, since the batch ended before."""

    requests: str
    """The file of all requests that the batch was converted to."""
    code: str
    message: str


def write_results(
    out: str,
    results: str,
    errors: str,
    *,
    endpoint: str,
    encoding_format: str = "float",
    model: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    unanswered: Unanswered | None = None,
) -> Counts:
    """Write the answers in the output `out` of a batch job to the file `results`, and its failed requests to `errors`.

    All three are paths or fsspec URLs, reached with `storage_options`. `endpoint`, `encoding_format`: as `Batch` has them;
    `model`: what the answers call the model, by default its source. Each file appears whole, `errors` first, and only where a request
    has failed: one that is there goes otherwise. The same parts make the same bytes. `unanswered`: also of an output that is not
    finished, or not begun; requests that nothing is committed of stand behind those that failed.

    Raises OutputError for an output that is not finished, or is not a batch job's.
    """
    storage = Storage(out, storage_options)
    parts = _parts(storage, partial=unanswered is not None)
    answers = _Answers(endpoint, model or (_model(storage) if parts else ""), encoding_format)
    completed = failed = 0
    seen: set[str] = set()
    with ExitStack() as open_files:
        good, bad = _opened(open_files, results, storage_options), None
        for created, rows in _requests(storage, parts, answers.columns):
            if unanswered is not None:
                seen.add(rows[0]["custom_id"])
            if all(row["error_code"] is not None for row in rows):
                bad = bad or _opened(open_files, errors, storage_options)
                bad.write(_line(answers.error(rows[0])))
                failed += 1
            else:
                good.write(_line(answers.answer(rows, created)))
                completed += 1
        for line in _lines_without(seen, unanswered, storage_options) if unanswered is not None else ():
            bad = bad or _opened(open_files, errors, storage_options)
            bad.write(_line(line))
            failed += 1
    if bad is None:
        place, name = locate(errors, storage_options)
        place.delete(name)
    return Counts(completed=completed, failed=failed)


def _opened(files: ExitStack, path: str, options: Mapping[str, Any] | None) -> BinaryIO:
    storage, name = locate(path, options)
    return files.enter_context(storage.writing(name))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


# ── What the parts hold ──────────────────────────────────────────────────────────────────────────────────────────


def _parts(storage: Storage, *, partial: bool) -> Sequence[Part]:
    """What is committed, which is everything unless `partial`. Raises OutputError."""
    if partial and (not read_spec(storage) or load_plan(storage) is None):
        return ()  # its run ended before anything was asked
    books = fold(storage, opened(storage)[1])
    if not partial and not (storage.exists(SUCCESS) and books.complete):
        raise OutputError(
            f"{storage.url()} is not finished: run the batch again, which takes up what is left"
        )
    return books.parts


def _model(storage: Storage) -> str:
    """What answered: a hub id, a URL, or the name of a local folder."""
    record, _ = opened(storage)
    source = load(record["spec"], [], record.get("variables") or {}).spec.model.source
    return source.rstrip("/").rpartition("/")[2] if source.startswith("/") else source


def _requests(
    storage: Storage, parts: Sequence[Part], columns: tuple[str, ...]
) -> Iterator[tuple[int, list[Row]]]:
    """(Unix time at which it was answered, the rows) of each request, in the order of the input: one row for each sample."""
    for part in parts:
        created = int(part.footer.provenance.committed_at)
        for _, rows in groupby(_rows(storage, part, columns), itemgetter("row_id")):
            yield created, list(rows)


def _rows(storage: Storage, part: Part, columns: tuple[str, ...]) -> Iterator[Row]:
    name = f"data/{part.name}"
    try:
        with storage.open_input(name) as file, pq.ParquetFile(file) as parquet:
            there = set(parquet.schema_arrow.names)
            if "custom_id" not in there or not there & {"generated_text", VECTOR}:
                raise OutputError(f"{storage.url()} is not the output of a batch of requests")
            batches = parquet.iter_batches(_BATCH_ROWS, columns=[name for name in columns if name in there])
            yield from chain.from_iterable(batch.to_pylist() for batch in batches)
    except (pa.ArrowException, OSError) as error:
        raise_if_damaged(error, storage.url(name))
        raise


def _lines_without(
    seen: set[str], unanswered: Unanswered, options: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """The lines of all other requests, in their order."""
    storage, name = locate(unanswered.requests, options)
    with storage.open_input(name) as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["custom_id"]):
            for custom_id in batch.column(0).to_pylist():
                if custom_id not in seen:
                    yield {
                        "id": f"batch_req_{_hash(custom_id)}",
                        "custom_id": custom_id,
                        "response": None,
                        "error": {"code": unanswered.code, "message": unanswered.message},
                    }


# ── What the lines say ───────────────────────────────────────────────────────────────────────────────────────────


class _Answers:
    """The lines of one endpoint."""

    def __init__(self, endpoint: str, model: str, encoding_format: str) -> None:
        self.endpoint, self.model, self.encoding_format = endpoint, model, encoding_format
        self.columns: tuple[str, ...] = ("custom_id", "row_id", "sample_index", "error_code", "error_message")
        if endpoint == EMBEDDINGS:
            self.columns += (VECTOR, f"{VECTOR}_prompt_tokens")
        else:
            self.columns += ("generated_text", "finish_reason", "prompt_tokens", "completion_tokens")
            self.columns += ("cached_tokens", "reasoning", "reasoning_tokens", "tool_calls")

    def answer(self, rows: list[Row], created: int) -> dict[str, Any]:
        """The line of a request that has an answer."""
        good = [row for row in rows if row["error_code"] is None]
        digest = _digest(rows[0])
        if self.endpoint == EMBEDDINGS:
            body = self._embeddings(good[0])
        elif self.endpoint == CHAT:
            head = {"id": f"chatcmpl-{digest}", "object": "chat.completion"}
            body = {**head, **self._said(created, [_message(row) for row in good], good)}
        else:
            head = {"id": f"cmpl-{digest}", "object": "text_completion"}
            body = {**head, **self._said(created, [{"text": row["generated_text"]} for row in good], good)}
        return _response(rows[0], 200, body)

    def error(self, row: Row) -> dict[str, Any]:
        """The line of a request that has failed."""
        code = row["error_code"]
        status = _STATUS.get(code, 400)
        error = {
            "message": row["error_message"],
            "type": "invalid_request_error" if status == 400 else "server_error",
            "param": ENDPOINTS[self.endpoint] if code in _OF_PROMPT else None,
            "code": code,
        }
        return _response(row, status, {"error": error})

    def _said(self, created: int, choices: list[dict[str, Any]], rows: list[Row]) -> dict[str, Any]:
        return {
            "created": created,
            "model": self.model,
            "choices": [
                {"index": row["sample_index"], **choice, "logprobs": None, "finish_reason": _finish(row)}
                for choice, row in zip(choices, rows, strict=True)
            ],
            "usage": _usage(rows),
        }

    def _embeddings(self, row: Row) -> dict[str, Any]:
        vector: Any = row[VECTOR]
        if self.encoding_format == "base64":
            vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
        tokens = row[f"{VECTOR}_prompt_tokens"]
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": vector}],
            "model": self.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _response(row: Row, status: int, body: dict[str, Any]) -> dict[str, Any]:
    digest = _digest(row)
    return {
        "id": f"batch_req_{digest}",
        "custom_id": row["custom_id"],
        "response": {"status_code": status, "request_id": f"req_{digest}", "body": body},
        "error": None,
    }


def _digest(row: Row) -> str:
    """The same whenever the results are written."""
    return _hash(row["row_id"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _message(row: Row) -> dict[str, Any]:
    calls = row.get("tool_calls")
    message = {
        "role": "assistant",
        "content": (row["generated_text"] or None) if calls else row["generated_text"],
    }
    message["refusal"] = None
    if "reasoning" in row:
        message["reasoning"] = row["reasoning"]
    if calls:
        digest = _digest(row)[:20]
        message["tool_calls"] = [
            {"id": f"call_{digest}{row['sample_index']}_{place}", "type": "function", "function": call}
            for place, call in enumerate(calls)
        ]
    return {"message": message}


def _finish(row: Row) -> str:
    finish: str = row["finish_reason"]
    return "tool_calls" if row.get("tool_calls") and finish == "stop" else finish


def _usage(rows: list[Row]) -> dict[str, Any]:
    """Of all samples; the prompt is counted once."""
    prompt, completion = rows[0]["prompt_tokens"], sum(row["completion_tokens"] for row in rows)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    cached, reasoning = rows[0]["cached_tokens"], [row.get("reasoning_tokens") for row in rows]
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    if all(tokens is not None for tokens in reasoning):
        usage["completion_tokens_details"] = {"reasoning_tokens": sum(reasoning)}
    return usage
