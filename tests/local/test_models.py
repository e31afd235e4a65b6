"""Models from a real HTTP S3 endpoint: by the command line, by two processes at once, through a kill, and in a job on the
real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import s3fs

from tests.local.runs import REAL, ROOT, TINY, dray, job, rows_of, write_questions
from tests.local.s3_server import S3Server

pytestmark = pytest.mark.timeout(300)

#: Pulls a model in small requests, each slowed down; prints how many bytes it asked of the store, and the folder.
_PULL = """
import sys, time
from pipelines import model_cache, model_source
from pipelines.storage import Storage
model_source.CHUNK, pause, read, whole = 1 << 16, float(sys.argv[2]), [], Storage.read_range
def slow(self, *args, **kwargs):
    time.sleep(pause)
    data = whole(self, *args, **kwargs)
    read.append(len(data))
    return data
Storage.read_range = slow
folder, manifest = model_cache.pull(sys.argv[1])
print(sum(read), folder)
"""


@pytest.fixture
def env(s3: S3Server, tmp_path: Path) -> dict[str, str]:
    return {**s3.env, "DRAY_MODELS": str(tmp_path / "cache")}


@pytest.fixture
def model(s3: S3Server) -> str:
    """The tiny model in the bucket, as `aws s3 sync` would put it."""
    store = s3fs.S3FileSystem(**s3.storage_options)
    for path in TINY.iterdir():
        store.put_file(str(path), f"{s3.bucket}/models/tiny/{path.name}")
    return f"{s3.url}/models/tiny"


def start_pull(model: str, env: dict[str, str], pause_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PULL, model, str(pause_s)]
    return subprocess.Popen(command, env={**os.environ, **env}, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_at_once_one_downloads(model: str, env: dict[str, str]) -> None:
    pulls = [start_pull(model, env, 0.1) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in pulls]
    assert [process.returncode for process in pulls] == [0, 0]
    size = sum(path.stat().st_size for path in TINY.iterdir())
    assert sorted(int(count) for count, _ in said) == [0, size]
    assert said[0][1] == said[1][1]
    assert (Path(said[0][1]) / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_a_killed_pull_is_gone_on_with(model: str, env: dict[str, str], tmp_path: Path) -> None:
    killed = start_pull(model, env, 0.1)
    partial = tmp_path / "cache" / ".partial"
    deadline = time.monotonic() + 60
    while sum(part.stat().st_size for part in partial.rglob(".model.safetensors.*.part")) < 600_000:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    listed = json.loads(dray("models", "list", "--json", env=env).stdout)
    assert (listed["models"], len(listed["unfinished"])) == ([], 1)

    second = start_pull(model, env, 0)
    count, folder = second.communicate(timeout=120)[0].split()

    size = sum(path.stat().st_size for path in TINY.iterdir())
    assert 0 < int(count) < size - 500_000
    assert (Path(folder) / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert dray("models", "verify", env=env).returncode == 0


def test_a_flipped_byte_in_the_bucket_stops_a_job_before_any_engine(
    s3: S3Server, env: dict[str, str], tmp_path: Path
) -> None:
    published = tmp_path / "published"
    done = dray("models", "pull", str(TINY), "--to", str(published), env=env)
    assert done.returncode == 0, done.stderr
    store = s3fs.S3FileSystem(**s3.storage_options)
    data = bytearray((published / "model.safetensors").read_bytes())
    data[777_777] ^= 1
    (published / "model.safetensors").write_bytes(data)
    for path in published.iterdir():
        store.put_file(str(path), f"{s3.bucket}/m/{path.name}")

    refused = dray("models", "pull", f"{s3.url}/m", env=env)

    assert refused.returncode == 2
    assert "model.safetensors: its content has sha256" in refused.stderr
    assert json.loads(dray("models", "list", "--json", env=env).stdout)["models"] == []
    write_questions(tmp_path / "in", rows=10)
    settings = job(tmp_path / "in", tmp_path / "out", model={**REAL, "source": f"{s3.url}/m"})
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    asked = dray("preview", str(tmp_path / "job.yaml"), "-n", "1", "--generate", env=env)
    assert asked.returncode == 2, asked.stderr
    assert "model.safetensors: its content has sha256" in asked.stderr


@pytest.mark.long
def test_a_job_on_a_model_in_the_bucket(
    model: str, s3: S3Server, env: dict[str, str], tmp_path: Path
) -> None:
    asked = write_questions(tmp_path / "in", rows=200, files=2)
    settings: dict[str, Any] = job(
        tmp_path / "in",
        tmp_path / "out",
        model={**REAL, "source": model, "storage_options": s3.storage_options},
        shards={"rows": 100},
    )
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    own = {"DRAY_MODELS": env["DRAY_MODELS"]}  # no AWS variables: model.storage_options do

    done = dray("run", str(tmp_path / "job.yaml"), "--json", env=own)

    assert done.returncode == 0, done.stderr
    answers = dict(zip(asked["question"].to_pylist(), asked["answer"].to_pylist(), strict=True))
    found = rows_of(tmp_path / "out").to_pylist()
    assert sum(answers[row["question"]] == row["generated_text"] for row in found) >= 196
    spec = (tmp_path / "out" / ".dray" / "spec.json").read_text()
    assert s3.secret not in spec
    pin = json.loads(spec)["model_pin"]
    assert pin["revision"].startswith("listing:")
    cached = json.loads(dray("models", "list", "--json", env=own).stdout)["models"]
    assert (pin["revision"], True) in {(entry["revision"], entry["weights"]) for entry in cached}
