"""`dray serve` as its users and its killers see it: OpenAI's client, real Ray, SIGKILL."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
import yaml
from openai.types import Batch

from tests.local.runs import DRAY, ROOT, TINY, dray
from tests.processes import end_all, left_at_work, still_runs

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

REQUESTS = 400


@contextmanager
def served(folder: Path, key_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "-m", f"tiny={folder / 'job.yaml'}", "--store", str(folder / "store")]
    command += ["--keys", str(key_file), "--port", str(port), "--access-log", str(folder / "access.jsonl")]
    with subprocess.Popen([*DRAY, *command], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def until(client: openai.OpenAI, id_: str, *states: str) -> Batch:
    while True:
        try:
            batch = client.batches.retrieve(id_)
            if batch.status in states:
                return batch
        except openai.APIConnectionError:  # it has still to start
            pass
        time.sleep(0.2)


def test_a_batch_outlives_a_killed_server(tmp_path: Path) -> None:
    key = dray("keys", "new", "ann", str(tmp_path / "keys.txt")).stdout.strip()
    model = {"source": str(TINY), "backend": "simulated", "simulated": {"tokens_per_s": 800}}
    cluster = yaml.safe_load((ROOT / "conf/clusters/local.yaml").read_text())
    job = {
        "model": model,
        "shards": {"rows": 40},
        "pool": {"device": "cpu", "shards_in_flight": 2},
        **cluster,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    asked = [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"say {number}"}],
                "max_tokens": 24 if number % 2 else 30,
            },
        }
        for number in range(REQUESTS)
    ]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    committed = tmp_path / "store" / "batches"

    with served(tmp_path, tmp_path / "keys.txt") as (server, url):
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=20)
        file = client.files.create(file=tmp_path / "batch.jsonl", purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while len(list(committed.glob("*/work/out/data/*.parquet"))) < 2:
            assert client.batches.retrieve(batch.id).status in ("validating", "in_progress")
            time.sleep(0.1)
        its_own = psutil.Process(server.pid).children(recursive=True)
        (run,) = psutil.Process(server.pid).children()
        server.send_signal(signal.SIGKILL)
        server.wait()
        _, left = psutil.wait_procs([run], timeout=10)
        assert not [process for process in left if still_runs(process)]
        end_all(its_own)

    before = len(list(committed.glob("*/work/out/data/*.parquet")))
    assert before < REQUESTS // 40
    with served(tmp_path, tmp_path / "keys.txt") as (server, url):
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=20)
        done = until(client, batch.id, "completed", "failed")
        assert done.status == "completed", done.errors
        assert done.request_counts is not None
        assert done.request_counts.completed == REQUESTS
        lines = client.files.content(done.output_file_id or "").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [line["custom_id"] for line in asked]
    logged = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert {line["key"] for line in logged} == {"ann"}
    verdict = dray("verify", str(next(committed.glob("*/work/out"))), "--deep", "--json")
    assert json.loads(verdict.stdout)["ok"], verdict.stdout


def test_a_server_that_is_stopped_ends_its_run(tmp_path: Path) -> None:
    key = dray("keys", "new", "ann", str(tmp_path / "keys.txt")).stdout.strip()
    model = {"source": str(TINY), "backend": "simulated", "simulated": {"tokens_per_s": 20}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": model, "errors": {"shutdown_grace_s": 0}}))
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "say a"}}
    lines = [json.dumps({**line, "custom_id": f"row-{number}"}) for number in range(200)]
    (tmp_path / "batch.jsonl").write_text("\n".join(lines))
    with served(tmp_path, tmp_path / "keys.txt") as (server, url):
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=20)
        file = client.files.create(file=tmp_path / "batch.jsonl", purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        until(client, batch.id, "in_progress")
        while not (children := psutil.Process(server.pid).children(recursive=True)):
            time.sleep(0.1)
        time.sleep(6)  # into the run
        children = psutil.Process(server.pid).children(recursive=True)
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as stalled:
            head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9999\r\n\r\n--b"
            stalled.sendall(head.encode())
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 130
        assert not left_at_work(children)
    record = json.loads((tmp_path / "store" / "batches" / batch.id / "batch.json").read_text())
    assert record["status"] == "in_progress"
