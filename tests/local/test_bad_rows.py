"""A thousand rows that nobody checked, on the real engine: good ones are answered, bad ones say why, none is lost."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from jobs.inspect import verify
from pipelines.errors import ROW_ERROR_CODES
from pipelines.storage import Storage
from tests.local.runs import REAL, held_out, job, rows_of

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]

ROWS = 1000


def dirty(folder: Path) -> dict[int, str]:
    """Write `ROWS` rows, every tenth spoiled; returns the error code that each spoiled row should get."""
    texts: list[bytes | None] = [question.question.encode() for question in held_out(ROWS)]
    expected: dict[int, str] = {}
    for i in range(0, ROWS, 10):
        kind = (i // 10) % 4
        if kind == 0:
            texts[i], expected[i] = b"why " * 2000, "prompt_too_long"
        elif kind == 1:
            texts[i], expected[i] = b"", "empty_prompt"
        elif kind == 2:
            texts[i], expected[i] = None, "missing_value"
        else:
            texts[i], expected[i] = b"caf\xe9 \xff", "invalid_utf8"
    # A string column with bytes that are not UTF-8, as careless writers leave it: Arrow does not look when it writes.
    question = pa.array(texts, pa.binary()).view(pa.string())
    folder.mkdir()
    half = ROWS // 2
    number = pa.array(range(ROWS), pa.int64())
    table = pa.table({"question": question, "number": number})
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=130)
    pq.write_table(table.slice(half), folder / "b.parquet")
    # A file that lacks the prompt's column altogether: its rows are null there.
    pq.write_table(pa.table({"number": pa.array(range(ROWS, ROWS + 20), pa.int64())}), folder / "c.parquet")
    return {**expected, **dict.fromkeys(range(ROWS, ROWS + 20), "missing_value")}


def test_good_rows_come_out_and_bad_ones_say_why(tmp_path: Path) -> None:
    expected = dirty(tmp_path / "in")
    settings = job(
        tmp_path / "in", tmp_path / "out", model=REAL, errors={"max_error_rate": 0.2}, shards={"rows": 150}
    )
    report = run(load(settings))

    assert report.state == "complete"
    assert (report.stats.rows_in, report.stats.rows_failed) == (ROWS + 20, len(expected))
    assert report.stats.balanced
    found = rows_of(tmp_path / "out").to_pylist()
    assert sorted(row["number"] for row in found) == list(range(ROWS + 20))
    assert {row["number"]: row["error_code"] for row in found if row["error_code"]} == expected
    for row in found:
        if row["error_code"]:
            assert row["error_code"] in ROW_ERROR_CODES
            assert row["error_message"]
            assert row["generated_text"] is None
        else:
            assert row["generated_text"]
            assert row["finish_reason"] in ("stop", "length")
    answers = {question.question: question.answer for question in held_out(ROWS)}
    good = [row for row in found if not row["error_code"]]
    right = sum(row["generated_text"] == answers[row["question"]] for row in good)
    # Bad neighbours cost the good rows nothing.
    assert right / len(good) >= 0.99
    assert verify(Storage(str(tmp_path / "out")), deep=True)["ok"]
