"""Adapters and quantised checkpoints in a job on the real engine: the texts are those of bare vLLM on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.local.bare_vllm import bare_vllm
from tests.local.runs import REAL, TINY, dray, held_out, job, rows_of, write_questions
from tests.tiny_models import lora_adapter, merged, quantised

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ROWS = 100
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 48}


def engine(dtype: str) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
    }


def bare_texts(model: Path, dtype: str) -> list[str]:
    asked = [[{"role": "user", "content": question.question}] for question in held_out(ROWS)]
    answers = bare_vllm({"model": str(model), **engine(dtype)}, SAMPLING, asked)
    return [answer["samples"][0]["text"] for answer in answers]


@pytest.fixture(scope="module")
def base() -> list[str]:
    """What the model answers without anything."""
    return bare_texts(TINY, "float32")


def job_file(folder: Path, dtype: str, **model: Any) -> str:
    write_questions(folder / "in", rows=ROWS)
    settings = job(
        folder / "in",
        folder / "out",
        model={**REAL, "engine": engine(dtype), **model},
        sampling=SAMPLING,
        shards={"rows": ROWS // 2},
    )
    (folder / "job.yaml").write_text(json.dumps(settings))
    return str(folder / "job.yaml")


def job_texts(folder: Path, dtype: str, **model: Any) -> list[str]:
    done = dray("run", job_file(folder, dtype, **model), "--json", timeout=400)
    assert done.returncode == 0, done.stderr
    assert not json.loads(done.stdout)["simulated"]
    rows = rows_of(folder / "out").to_pylist()
    return [row["generated_text"] for row in sorted(rows, key=lambda row: int(row["row_id"].split("#")[1]))]


def test_an_adapter_is_applied(base: list[str], tmp_path: Path) -> None:
    adapter = lora_adapter(TINY, tmp_path / "adapter")
    texts = job_texts(tmp_path, "float32", lora={"source": str(adapter)})
    assert texts == bare_texts(merged(TINY, adapter, tmp_path / "merged"), "float32")
    assert sum(text != without for text, without in zip(texts, base, strict=True)) >= ROWS // 20


def test_an_adapter_that_does_not_fit_ends_the_job(tmp_path: Path) -> None:
    """Its rows are not taken for ones that kill engines."""
    adapter = lora_adapter(TINY, tmp_path / "adapter", extra_rows=8)
    failed = dray("run", job_file(tmp_path, "float32", lora={"source": str(adapter)}))
    assert failed.returncode == 1, failed.stderr
    assert f"adapter {str(adapter)!r} does not load: RuntimeError: " in failed.stderr
    assert "The size of tensor a" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "out").glob("data/*.parquet"))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_one_of_its_files_is_refused(tmp_path: Path, missing: str) -> None:
    adapter = lora_adapter(TINY, tmp_path / "adapter")
    (adapter / missing).unlink()
    refused = dray("run", job_file(tmp_path, "float32", lora={"source": str(adapter)}))
    assert refused.returncode == 2, refused.stderr
    assert f"model.lora.source: {adapter} is no LoRA adapter: it has no {missing}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["int8-w8a8", "int4-w4a16", "gptq", "awq"])
def test_a_quantised_checkpoint(base: list[str], tmp_path: Path, kind: str) -> None:
    model = quantised(TINY, tmp_path / "model", kind)
    texts = job_texts(tmp_path, "bfloat16", source=str(model))
    assert texts == bare_texts(model, "bfloat16")
    # Rounded weights, not others: some answers change.
    assert 0 < sum(text != without for text, without in zip(texts, base, strict=True)) < ROWS // 2
