"""The main job as a user has it: by the command line, from S3 to S3 on the real engine, over rows that nobody checked."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import s3fs

from pipelines.errors import ROW_ERROR_CODES
from tests.local.runs import REAL, dray, held_out, job
from tests.local.s3_server import S3Server

pytestmark = pytest.mark.timeout(300)

ROWS = 400


def dirty(folder: Path) -> dict[int, str]:
    """Write `ROWS` rows and twenty more, every tenth spoiled; returns the error code that each spoiled row should get."""
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


def test_good_rows_come_out_and_bad_ones_say_why(s3: S3Server, tmp_path: Path) -> None:
    expected = dirty(tmp_path / "in")
    store = s3fs.S3FileSystem(**s3.storage_options)
    store.put(f"{tmp_path}/in/", f"{s3.bucket}/prompts/", recursive=True)
    settings = job(
        f"s3://{s3.bucket}/prompts/",
        f"s3://{s3.bucket}/out",
        model=REAL,
        errors={"max_error_rate": 0.2},
        shards={"rows": 90},
        input={"storage_options": s3.storage_options},  # written out, as one should not
    )
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(settings))

    done = dray("run", str(job_file), "--json", env=s3.env)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["state"], report["simulated"]) == ("complete", False)
    assert (report["stats"]["rows_in"], report["stats"]["rows_failed"]) == (ROWS + 20, len(expected))
    assert report["stats"]["rows_ok"] == ROWS + 20 - len(expected)
    store.invalidate_cache()
    names = {name.removeprefix(f"{s3.bucket}/out/") for name in store.find(f"{s3.bucket}/out")}
    assert "data/_SUCCESS" in names
    assert len([name for name in names if name.startswith("data/part-")]) == report["shards_planned"] == 7

    found = ds.dataset(f"{s3.bucket}/out/data", filesystem=store, format="parquet").to_table().to_pylist()
    assert all(row["row_id"].startswith(f"s3://{s3.bucket}/prompts/") for row in found)
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

    # Nothing that was stored holds the key that the run used.
    for name in names:
        assert s3.secret.encode() not in store.cat(f"{s3.bucket}/out/{name}")
    again = dray("run", str(job_file), "--json", env=s3.env)
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["runs"]) == 2
    verdict = dray("verify", f"s3://{s3.bucket}/out", "--deep", env=s3.env)
    assert verdict.returncode == 0, verdict.stderr
    with store.open(f"{s3.bucket}/out/stats/shards.parquet") as file:
        assert sum(pq.read_table(file)["rows_ok"].to_pylist()) == len(good)
