"""The main job with input and output on a real HTTP S3 endpoint, by the command line, on the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import s3fs

from tests.local.runs import REAL, dray, job, write_questions
from tests.local.s3_server import S3Server

pytestmark = pytest.mark.timeout(300)


def test_the_main_job_from_s3_to_s3(s3: S3Server, tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=400, files=3)
    store = s3fs.S3FileSystem(**s3.storage_options)
    store.put(f"{tmp_path}/in/", f"{s3.bucket}/prompts/", recursive=True)
    settings = job(
        f"s3://{s3.bucket}/prompts/",
        f"s3://{s3.bucket}/out",
        model=REAL,
        shards={"rows": 100},
        input={"storage_options": s3.storage_options},  # written out, as one should not
    )
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(settings))

    done = dray("run", str(job_file), "--json", env=s3.env)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["stats"]["rows_ok"] == 400
    store.invalidate_cache()
    names = {name.removeprefix(f"{s3.bucket}/out/") for name in store.find(f"{s3.bucket}/out")}
    assert "data/_SUCCESS" in names
    assert len([name for name in names if name.startswith("data/part-")]) == report["shards_planned"] == 6
    found = ds.dataset(f"{s3.bucket}/out/data", filesystem=store, format="parquet").to_table()
    answers = dict(zip(asked["question"].to_pylist(), asked["answer"].to_pylist(), strict=True))
    right = sum(answers[row["question"]] == row["generated_text"] for row in found.to_pylist())
    assert right >= 396
    assert found["row_id"][0].as_py().startswith(f"s3://{s3.bucket}/prompts/")
    # Nothing that was stored holds the key that the run used.
    for name in names:
        assert s3.secret.encode() not in store.cat(f"{s3.bucket}/out/{name}")
    again = dray("run", str(job_file), "--json", env=s3.env)
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["runs"]) == 2
    verdict = dray("verify", f"s3://{s3.bucket}/out", "--deep", env=s3.env)
    assert verdict.returncode == 0, verdict.stderr
    with store.open(f"{s3.bucket}/out/stats/shards.parquet") as file:
        assert sum(pq.read_table(file)["rows_ok"].to_pylist()) == 400
