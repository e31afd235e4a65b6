"""`embed`, `classify` and `score` with real Ray and vLLM: row by row what bare vLLM, and transformers, say of the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import load, run
from jobs.inspect import verify
from pipelines.storage import Storage
from tests.local.bare_vllm import bare_pooling
from tests.local.runs import REAL, TINY, job, rows_of, write_questions
from tests.tiny_models import classifier, embedding_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2**26,
}
LABELS = ["sport", "trade", "weather", "other"]


def finished(folder: Path, rows: int, model: dict[str, Any], *steps: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a job without a prompt over questions; its rows, in order."""
    write_questions(folder / "in", rows=rows)
    settings = job(
        folder / "in",
        folder / "out",
        model={**REAL, **model},
        prompt=None,
        shards={"rows": 12},
        pool={"cpus_per_engine": 1},
        steps=[*steps],
    )
    report = run(load(settings))
    assert report.state == "complete"
    assert verify(Storage(str(folder / "out")), deep=True)["problems"] == []
    return rows_of(folder / "out").to_pylist()


def test_a_corpus_is_embedded_as_bare_vllm_embeds_it(tmp_path: Path) -> None:
    source = str(embedding_model(tmp_path / "model"))
    step = {"embed": {"column": "vector", "prompt": {"template": "query: {{ question }}"}}}
    rows = finished(tmp_path, 40, {"source": source, "engine": ENGINE}, step)
    texts = [f"query: {row['question']}" for row in rows]
    bare = bare_pooling("embed", {"model": source, **ENGINE}, texts)
    assert len({tuple(vector) for vector in bare}) == 40
    for row, vector in zip(rows, bare, strict=True):
        assert row["vector"] == pytest.approx(vector, abs=1e-5)


@pytest.mark.long
def test_texts_are_classified_as_bare_vllm_classifies_them(tmp_path: Path) -> None:
    source = str(classifier(tmp_path / "model", LABELS))
    step = {"classify": {"column": "topic", "prompt": {"prompt_column": "question"}, "probabilities": True}}
    rows = finished(tmp_path, 40, {"source": source, "engine": ENGINE}, step)
    bare = bare_pooling("classify", {"model": source, **ENGINE}, [row["question"] for row in rows])
    for row, probabilities in zip(rows, bare, strict=True):
        assert row["topic_probabilities"] == pytest.approx(probabilities, abs=1e-5)
        assert row["topic"] == LABELS[probabilities.index(max(probabilities))]
        assert row["topic_probability"] == max(row["topic_probabilities"])
    assert len({row["topic"] for row in rows}) > 1


@pytest.mark.long
def test_answers_are_scored_as_transformers_scores_them(tmp_path: Path) -> None:
    step = {"score": {"column": "fit", "prompt": {"prompt_column": "question"}, "answer": "answer"}}
    rows = finished(tmp_path, 30, {"engine": ENGINE}, step)
    expected = logprobs([(row["question"], row["answer"]) for row in rows])
    for row, each in zip(rows, expected, strict=True):
        assert row["fit_tokens"] == len(each)
        assert row["fit_logprob"] == pytest.approx(sum(each), rel=1e-4, abs=1e-3)
        assert row["fit_perplexity"] == pytest.approx(2.718281828 ** (-sum(each) / len(each)), rel=1e-3)
    # The model was trained on such questions: a wrong answer would be far less likely.
    swapped = logprobs([(row["question"], rows[i - 1]["answer"]) for i, row in enumerate(rows)])
    assert sum(sum(each) for each in expected) > sum(sum(each) for each in swapped)


def logprobs(pairs: list[tuple[str, str]]) -> list[list[float]]:
    """For each (question, answer) the log-probability of each token of the answer, by transformers' own forward pass."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    found = []
    for question, answer in pairs:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        found.append([float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(ids)])
    return found
