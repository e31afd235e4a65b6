"""Inputs, outputs and models that are not where or what the job says, by the installed command: `dray run` exits with 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.local.runs import TINY, dray, job, write_questions
from tests.local.s3_server import S3Server
from tests.unit.stages import committed

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job that would run."""
    write_questions(tmp_path / "in", rows=8)
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job(tmp_path / "in", tmp_path / "out")))
    return path


def refusal(job_file: Path, *overrides: str, env: dict[str, str] | None = None) -> str:
    """The one line of a run that was refused."""
    done = dray("run", str(job_file), *overrides, "--quiet", env=env, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ")
    return line


def test_an_empty_input_folder(job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty" in refusal(job_file, f"input.path={tmp_path}/empty")


def test_an_unknown_engine_argument(job_file: Path) -> None:
    line = refusal(job_file, "model.engine.tensor_paralel_size=2")
    assert "tensor_paralel_size" in line
    assert "did you mean tensor_parallel_size?" in line


def test_a_folder_that_is_no_model(job_file: Path, tmp_path: Path) -> None:
    assert "is no model: it has no config.json" in refusal(job_file, f"model.source={tmp_path}/in")


def test_an_output_that_cannot_be_written(job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert f"{tmp_path}/file" in refusal(job_file, f"output.path={tmp_path}/file/out")


def test_an_output_that_holds_other_data(job_file: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "other" / "data", rows=3)
    assert "no Dray job wrote" in refusal(job_file, f"output.path={tmp_path}/other")


def test_the_output_of_a_different_spec(job_file: Path) -> None:
    committed(json.loads(job_file.read_text()))
    line = refusal(job_file, "sampling.max_tokens=9", "prompt.template=Q: {{ question }}")
    assert "different spec" in line
    assert "sampling.max_tokens: 48 → 9" in line
    assert "prompt.template" in line


@pytest.mark.parametrize("key", ["input.path", "output.path"])
def test_no_credentials_for_s3(job_file: Path, key: str) -> None:
    line = refusal(job_file, f"{key}=s3://some-bucket/place", env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert "credentials" in line
    assert "AWS_ACCESS_KEY_ID" in line


@pytest.mark.parametrize("key", ["input.path", "output.path"])
def test_a_bucket_that_does_not_exist(job_file: Path, key: str, s3: S3Server) -> None:
    line = refusal(job_file, f"{key}=s3://no-such-bucket-here/place", env=s3.env)
    assert "no-such-bucket-here" in line
    assert "bucket" in line


@pytest.mark.long
def test_a_model_that_does_not_load_stops_the_job_with_its_reason(job_file: Path, tmp_path: Path) -> None:
    """Found out only by the engine: exit code 1, one line, the reason from inside vLLM."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in TINY.iterdir():
        if file.suffix in (".json", ".jinja"):
            (broken / file.name).write_bytes(file.read_bytes())
    header = b"{}"  # a whole file, without a single tensor
    (broken / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    done = dray("run", str(job_file), f"model.source={broken}", "model.backend=vllm", "--quiet", timeout=150)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "does not start" in done.stderr
    assert "Traceback" not in done.stderr
