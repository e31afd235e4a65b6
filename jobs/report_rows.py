"""What the report's page shows of single rows: failed ones as examples, and how long prompts and answers are.

Footers do not hold these, so parts are read: a few of them, however many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.books import each
from pipelines.contracts import LOGPROBS_FIELD, RESULT_FIELDS
from pipelines.counting import distinct_answers
from pipelines.part import Part, raise_if_damaged
from pipelines.step_settings import StepSettings
from pipelines.storage import Storage

REDACTED = "[redacted]"
#: Failed rows shown of one code, codes shown, and parts opened for one code.
EXAMPLES = 3
CODES = 20
PARTS_OF_CODE = 4
#: Parts whose lengths are counted; of more, as many at even distances.
PARTS_COUNTED = 128
#: Characters shown of one value, and columns of one row.
SHOWN = 240
COLUMNS = 12
_RESULTS = frozenset(field.name for field in (*RESULT_FIELDS, LOGPROBS_FIELD))
#: Codes whose messages are Dray's own words and numbers. Every other may quote what a row holds, `missing_value` too: for
#: `{{ prices[customer] }}` it names the customer.
_OWN_WORDS = frozenset({"empty_prompt", "prompt_too_long", "request_timeout"})
_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Example:
    """One failed row, fit for showing."""

    row_id: str
    message: str
    columns: dict[str, str]
    """Input columns by their names in the output."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How many rows and answers have how many tokens."""

    prompts: Counter[int]
    answers: Counter[int]
    parts: int
    """Parts that were counted."""


def examples(
    storage: Storage, parts: Sequence[Part], hidden: frozenset[str], codes: Sequence[str]
) -> dict[str, list[Example]]:
    """Up to `EXAMPLES` rows for each of the first `CODES` codes. `hidden`: columns, as the output names them.

    Where any column is hidden, so is each error message that may quote the row.
    """
    return {code: _examples_of(storage, parts, code, hidden) for code in codes[:CODES]}


def _examples_of(storage: Storage, parts: Sequence[Part], code: str, hidden: frozenset[str]) -> list[Example]:
    found: list[Example] = []
    for part in [part for part in parts if code in part.footer.stats.error_codes][:PARTS_OF_CODE]:
        name = part.footer.errors_object or f"data/{part.name}"
        for row in _failed_rows(storage, name, code, EXAMPLES - len(found)):
            columns = {key: value for key, value in row.items() if key not in _RESULTS}
            found.append(
                Example(
                    row_id=row["row_id"],
                    message=REDACTED
                    if hidden and code not in _OWN_WORDS
                    else cut(row["error_message"] or ""),
                    columns={
                        key: REDACTED if key in hidden else shown(value)
                        for key, value in list(columns.items())[:COLUMNS]
                    },
                )
            )
        if len(found) >= EXAMPLES:
            break
    return found


def _failed_rows(storage: Storage, name: str, code: str, most: int) -> Iterator[dict[str, Any]]:
    """Up to `most` rows with this error code, without answers; none where the object went meanwhile."""
    try:
        with storage.open_input(name) as file, pq.ParquetFile(file) as parquet:
            wanted = [
                column
                for column in parquet.schema_arrow.names
                if column not in _RESULTS or column in ("row_id", "error_message")
            ]
            for group in range(parquet.num_row_groups):
                codes = parquet.read_row_group(group, columns=["error_code"])["error_code"]
                places = pc.indices_nonzero(pc.fill_null(pc.equal(codes, code), False))[:most]
                if len(places):
                    most -= len(places)
                    yield from parquet.read_row_group(group, columns=wanted).take(places).to_pylist()
                if most <= 0:
                    return
    except FileNotFoundError:
        return
    except (pa.ArrowException, OSError) as error:
        raise_if_damaged(error, storage.url(name))
        raise


def lengths(storage: Storage, parts: Sequence[Part]) -> Lengths:
    """Count `prompt_tokens` once a row and `completion_tokens` once an answer, of `PARTS_COUNTED` parts at most."""
    step = -(-len(parts) // PARTS_COUNTED) or 1
    chosen = [part.name for part in parts[::step]]
    prompts: Counter[int] = Counter()
    answers: Counter[int] = Counter()
    for _, table in each(chosen, lambda name: _tokens(storage, f"data/{name}"), _READERS):
        if table is not None:
            table = distinct_answers(table)
            first = table.filter(pc.equal(table["sample_index"], 0))
            _count(prompts, first["prompt_tokens"])
            _count(answers, table["completion_tokens"])
    return Lengths(prompts=prompts, answers=answers, parts=len(chosen))


def _tokens(storage: Storage, name: str) -> pa.Table | None:
    columns = ["row_id", "sample_index", "prompt_tokens", "completion_tokens", "error_code"]
    try:
        with storage.open_input(name) as file:
            table = pq.read_table(file, columns=columns)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        raise_if_damaged(error, storage.url(name))
        raise
    return table.filter(pc.is_null(table["error_code"]))


def _count(counted: Counter[int], values: pa.ChunkedArray) -> None:
    for item in pc.value_counts(values.drop_null()).to_pylist():
        counted[item["values"]] += item["counts"]


def hidden_columns(
    redact: Sequence[str],
    rename: Mapping[str, str],
    steps: Sequence[StepSettings],
    conversation: str | None = None,
) -> frozenset[str]:
    """Input columns by their names in the output, a renamed one by both; the elements of their lists; and where anything is
    hidden the conversations (`conversation`: the job's own), which quote what was asked."""
    hidden = {*redact, *(rename.get(name, name) for name in redact)}
    if hidden:
        told = [conversation, *(step.generate.conversation for step in steps if step.generate)]
        hidden |= {name for name in told if name is not None}
    for step in steps:
        if step.explode is not None:
            sources = step.explode.columns or (step.explode.column or "",)
            if any(column.partition(".")[0] in hidden for column in sources):
                hidden.add(step.explode.into)
        if step.gather is not None:
            hidden |= {new for old, new in step.gather.columns.items() if old.partition(".")[0] in hidden}
    return frozenset(hidden)


def shown(value: Any) -> str:
    """A cell in words."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return cut(value if isinstance(value, str) else repr(value))


def cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
