"""The batch API with its files, batches and outputs on a real S3 server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipelines.storage import Storage
from tests.local.s3_server import S3Server
from tests.unit.batch_serving import Half, Server, created, ended, lines, told


def test_a_batch_lives_in_a_bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    root = f"{s3.url}/batches-of-all"
    bucket = Storage(root)
    server = Server(tmp_path, store=root)
    client = server.client()
    data = lines(12, max_tokens=8)
    batch = created(client, data)
    assert client.files.content(batch.input_file_id).content == data
    server.start = Half
    with server.working():
        while not any("/out/data/part-" in info.name for info in bucket.list("batches")):
            time.sleep(0.05)

    again = Server(tmp_path, store=root)
    with again.working():
        done = ended(again.client(), batch.id)
    assert done.status == "completed", done.errors
    answers = told(again.client(), done.output_file_id)
    assert [line["custom_id"] for line in answers] == [f"row-{number}" for number in range(12)]
    names = {info.name for info in bucket.list("files")}
    assert names == {
        f"files/{id_}/{name}"
        for id_ in (batch.input_file_id, done.output_file_id)
        for name in ("file.json", "content.jsonl")
    }
