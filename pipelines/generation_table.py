"""Answers as `contracts.GENERATION_SCHEMA`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import GENERATION_SCHEMA
from pipelines.engine import Answer
from pipelines.errors import RowError


def unanswered(prompts: pa.Table) -> pa.Table:
    """`GENERATION_SCHEMA` for prompts that no engine is asked: one row each, with its error if it has one."""
    return generation_table(prompts, [None] * len(prompts))


def generation_table(prompts: pa.Table, results: Sequence[Answer | RowError | None]) -> pa.Table:
    """`GENERATION_SCHEMA`: one row per sample, or one row with the error of a prompt that got none."""
    codes, messages = prompts["error_code"].to_pylist(), prompts["error_message"].to_pylist()
    rows: list[tuple[Any, ...]] = []
    token_ids: list[array[int] | None] = []
    values: list[npt.NDArray[np.float32] | None] = []
    for row, result in enumerate(results):
        if isinstance(result, Answer):
            for index, sample in enumerate(result.samples):
                token_ids.append(sample.token_ids)
                values.append(sample.values)
                rows.append(
                    (
                        row,
                        index,
                        sample.text,
                        sample.finish_reason,
                        result.cached_tokens,
                        result.image_tokens,
                        sample.logprobs,
                        None,
                        None,
                    )
                )
        else:
            code, message = (
                (result.code, str(result)) if isinstance(result, RowError) else (codes[row], messages[row])
            )
            token_ids.append(None)
            values.append(None)
            rows.append((row, 0, None, None, None, None, None, code, message))
    lists = {"token_ids": _lists(token_ids, np.int32), "values": _lists(values, np.float32)}
    names = [name for name in GENERATION_SCHEMA.names if name not in lists]
    columns: dict[str, Any] = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {}
    columns = {name: columns.get(name, ()) for name in names} | lists
    return pa.table({name: columns[name] for name in GENERATION_SCHEMA.names}, schema=GENERATION_SCHEMA)


def _lists(rows: Sequence[array[int] | npt.NDArray[Any] | None], type_: type[np.generic]) -> pa.ListArray:
    """Arrays of C ints or floats as one Arrow array, without a Python object per number."""
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int32)
    values = np.frombuffer(b"".join(row.tobytes() for row in rows if row is not None), type_)
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values), mask=missing)
