"""Steps on an NVIDIA GPU: vectors, labels and scores beside bare vLLM and transformers, and parsers behind a real engine's constraints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.inspect import verify
from pipelines.storage import Storage
from tests.local.bare_vllm import bare_pooling
from tests.local.runs import REAL, dray, job, rows_of, write_questions
from tests.local.test_model_steps import ENGINE as ON_CPU
from tests.local.test_model_steps import LABELS, logprobs
from tests.local.test_reasoning import REASONED
from tests.tiny_models import classifier, embedding_model, thinking_model

pytestmark = pytest.mark.timeout(400)

ENGINE = {key: value for key, value in ON_CPU.items() if key != "kv_cache_memory_bytes"} | {
    "gpu_memory_utilization": 0.2
}
#: Of float32 on a GPU, whose attention may multiply in TF32: 10 bits.
NEAR = 2e-3


def finished(folder: Path, rows: int, model: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    """Run a job over questions by the command line; its rows, in order, after a deep verification."""
    write_questions(folder / "in", rows=rows)
    settings = job(
        folder / "in",
        folder / "out",
        model={**REAL, **model, "engine": {**ENGINE, **model.get("engine", {})}},
        shards={"rows": 12},
        pool={"device": "gpu"},
        **sections,
    )
    (folder / "job.yaml").write_text(json.dumps(settings))
    done = dray("run", str(folder / "job.yaml"), "--json", timeout=360)
    assert done.returncode == 0, done.stderr + done.stdout
    assert verify(Storage(str(folder / "out")), deep=True)["problems"] == []
    found: list[dict[str, Any]] = rows_of(folder / "out").to_pylist()
    return found


def test_vectors_are_bare_vllms(tmp_path: Path) -> None:
    source = str(embedding_model(tmp_path / "model"))
    step = {"embed": {"column": "vector", "prompt": {"template": "query: {{ question }}"}}}
    rows = finished(tmp_path, 40, {"source": source}, prompt=None, steps=[step])
    texts = [f"query: {row['question']}" for row in rows]
    bare = bare_pooling("embed", {"model": source, **ENGINE}, texts)
    assert len({tuple(vector) for vector in bare}) == 40
    for row, vector in zip(rows, bare, strict=True):
        assert row["vector"] == pytest.approx(vector, abs=NEAR)


def test_labels_are_bare_vllms(tmp_path: Path) -> None:
    source = str(classifier(tmp_path / "model", LABELS))
    step = {"classify": {"column": "topic", "prompt": {"prompt_column": "question"}, "probabilities": True}}
    rows = finished(tmp_path, 40, {"source": source}, prompt=None, steps=[step])
    bare = bare_pooling("classify", {"model": source, **ENGINE}, [row["question"] for row in rows])
    for row, probabilities in zip(rows, bare, strict=True):
        assert row["topic_probabilities"] == pytest.approx(probabilities, abs=NEAR)
        assert row["topic"] == LABELS[row["topic_probabilities"].index(row["topic_probability"])]
    assert len({row["topic"] for row in rows}) > 1


def test_scores_are_transformers(tmp_path: Path) -> None:
    step = {"score": {"column": "fit", "prompt": {"prompt_column": "question"}, "answer": "answer"}}
    rows = finished(tmp_path, 30, {}, prompt=None, steps=[step])
    expected = logprobs([(row["question"], row["answer"]) for row in rows])
    for row, each in zip(rows, expected, strict=True):
        assert row["fit_tokens"] == len(each)
        assert row["fit_logprob"] == pytest.approx(sum(each), rel=1e-2, abs=1e-2)
        assert row["fit_perplexity"] == pytest.approx(math.exp(-sum(each) / len(each)), rel=1e-2)


def test_constraints_hold_behind_the_reasoning(tmp_path: Path) -> None:
    """As on the CPU: a model that ends its reasoning at random says digits then, and anything before."""
    source = str(thinking_model(tmp_path / "model"))
    rows = finished(
        tmp_path,
        24,
        {"source": source, "engine": {"max_model_len": 1024, "max_num_seqs": 32}},
        prompt={"template": "{{ question }}"},
        sampling=REASONED,
    )
    assert all(re.fullmatch("[0-9]{2}", row["generated_text"]) for row in rows)
    reasonings = [row["reasoning"] for row in rows if row["reasoning"]]
    assert len(reasonings) > 12
    assert any(not re.fullmatch("[0-9]*", reasoning) for reasoning in reasonings)
