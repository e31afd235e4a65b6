"""What a dataset's files hold: Parquet, JSON lines, or OpenAI's lines for chat fine-tuning."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.conversations import Conversations
from pipelines.errors import RowError, SpecError
from pipelines.image_turns import has_images
from pipelines.settings import PromptSettings

#: Rows of a row group in a Parquet file.
_GROUP_ROWS = 16_384


class ParquetSink:
    """A Parquet file with row groups of up to 16 Ki rows."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = 0

    @property
    def size(self) -> int:
        waiting: int = sum(table.nbytes for table in self._waiting)
        return self._sink.tell() + waiting // 3  # about what zstd makes of text

    def write(self, records: pa.Table) -> None:
        self._waiting.append(records)
        self._rows += len(records)
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def close(self) -> bytes:
        self._flush()
        self._writer.close()
        return self._sink.getvalue()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).unify_dictionaries())
            self._waiting, self._rows = [], 0


class JsonSink:
    """One JSON object a line, in UTF-8."""

    def __init__(self, schema: pa.Schema) -> None:
        self._lines = bytearray()

    @property
    def size(self) -> int:
        return len(self._lines)

    def write(self, records: pa.Table) -> None:
        for record in records.to_pylist():
            self._lines += json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def close(self) -> bytes:
        return bytes(self._lines)


def plain(value: Any) -> Any:
    """A value as JSON has it: times as ISO 8601, bytes in base64, NaN and infinities as null, decimals and others as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, str | int) else str(value)


def with_columns(columns: list[str] | None) -> Callable[[pa.Table], pa.Table]:
    """What is written: these columns, or all but those that say why a record failed. Raises SpecError."""

    def prepare(records: pa.Table) -> pa.Table:
        if columns is None:
            return records.drop_columns(["error_code", "error_message"])
        if missing := [name for name in columns if name not in records.column_names]:
            raise SpecError(
                f"--columns: the output has no column {missing[0]!r}; it has {', '.join(records.column_names)}"
            )
        return records.select(columns)

    return prepare


def as_chats(
    prompt: PromptSettings,
    needs: frozenset[str],
    rename: Mapping[str, str],
    folders: tuple[str, ...],
    *,
    calls_tools: bool = False,
) -> Callable[[pa.Table], pa.Table]:
    """Records as OpenAI's fine-tuning lines: `messages`, the last of them the answer, and the prompt's `tools`.

    https://platform.openai.com/docs/guides/supervised-fine-tuning: a record whose prompt gives no messages, or whose
    answer is empty, is left out, and so is one with images. `needs`: the columns without which there is no prompt;
    `calls_tools`: whether `tool_calls` holds what answers call. Raises SpecError where the output does not hold one of them.
    """
    if calls_tools:
        needs |= {"tool_calls"}
    if prompt.chat is False:
        raise SpecError(
            "openai: `prompt.chat: false` asks for completions, of which there are no messages; see jsonl"
        )
    if prompt.images_column is not None:
        raise SpecError("openai: the lines would lack the images of prompt.images_column; see jsonl")
    conversations = Conversations(prompt, folders)
    back = {new: old for old, new in rename.items()}

    def prepare(records: pa.Table) -> pa.Table:
        asked = records.rename_columns([back.get(name, name) for name in records.column_names])
        if missing := sorted(needs - set(asked.column_names)):
            raise SpecError(
                f"openai: the prompt needs the column {missing[0]!r}, which the output does not hold"
            )
        found = conversations(asked.drop_columns(["error_code", "error_message"]))
        calls = asked["tool_calls"].to_pylist() if calls_tools else [None] * len(asked)
        answers = map(_answer, asked["generated_text"].to_pylist(), calls)
        tools = {} if prompt.tools is None else {"tools": prompt.tools}
        lines = [
            {"messages": [*messages, answer], **tools}
            for messages, answer in zip(found, answers, strict=True)
            if not isinstance(messages, RowError) and answer and not has_images(messages)
        ]
        return pa.table(
            {"line": pa.array([json.dumps(line, ensure_ascii=False) for line in lines], pa.string())}
        )

    return prepare


def _answer(text: str | None, calls: list[dict[str, str]] | None) -> dict[str, Any] | None:
    """The assistant's message; None where it says nothing and calls nothing."""
    if not text and not calls:
        return None
    said: dict[str, Any] = {"content": text} if text else {}
    if calls:
        said["tool_calls"] = [
            {"id": f"call_{place}", "type": "function", "function": call} for place, call in enumerate(calls)
        ]
    return {"role": "assistant", **said}


class LineSink(JsonSink):
    """Lines that are JSON already."""

    def write(self, records: pa.Table) -> None:
        for line in records["line"].to_pylist():
            self._lines += line.encode() + b"\n"
