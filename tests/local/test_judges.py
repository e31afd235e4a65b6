"""Judges on real Ray and vLLM: the verdicts that bare vLLM's answers to the same questions come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from jobs.inspect import verify
from pipelines.storage import Storage
from tests.local.bare_vllm import bare_vllm
from tests.local.runs import REAL, job, rows_of, write_questions
from tests.tiny_models import byte_level, with_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(400),
]

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 400,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2**26,
}
TONES = ["Monday", "seven", "left"]


def said(source: str, prompts: list[str], labels: list[str]) -> list[str]:
    """Bare vLLM's greedy answers, held to these labels."""
    sampling = {"temperature": 0, "max_tokens": 12, "structured_outputs": {"choice": labels}}
    return [one["samples"][0]["text"] for one in bare_vllm({"model": source, **ENGINE}, sampling, prompts)]


def test_labels_and_comparisons_are_bare_vllms(tmp_path: Path) -> None:
    source = str(with_weights(byte_level(tmp_path / "model")))  # random: its verdicts differ
    asked = write_questions(tmp_path / "questions", rows=40)
    answers = asked["answer"].to_pylist()
    table = asked.append_column("other", pa.array(answers[1:] + answers[:1]))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "rows.parquet")
    seen = {"columns": ["question"], "rubric": "Which one fits?"}
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        model={**REAL, "source": source, "engine": ENGINE},
        prompt=None,
        shards={"rows": 12},
        pool={"cpus_per_engine": 1},
        steps=[
            {"judge": {**seen, "column": "tone", "choices": TONES}},
            {"judge": {**seen, "column": "better", "compare": ["answer", "other"]}},
        ],
    )
    assert run(load(settings)).state == "complete"
    assert verify(Storage(str(tmp_path / "out")), deep=True)["problems"] == []
    rows: list[dict[str, Any]] = rows_of(tmp_path / "out").to_pylist()

    head = "Judge by this rubric:\nWhich one fits?\n\nquestion:\n{}\n\n"
    ending = f"Say one of these, and nothing else: {', '.join(TONES)}."
    tones = said(source, [head.format(row["question"]) + ending for row in rows], TONES)
    assert [row["tone"] for row in rows] == tones
    assert len(set(tones)) > 1

    ending = "Which answer is better by the rubric? Say 1 or 2, and nothing else."
    pair = head + "Answer 1:\n{}\n\nAnswer 2:\n{}\n\n" + ending
    orders = [("answer", "other"), ("other", "answer")]
    asked_pairs = [
        pair.format(row["question"], *(row[name] for name in order)) for row in rows for order in orders
    ]
    votes = said(source, asked_pairs, ["1", "2"])
    verdicts = {("1", "2"): "a", ("2", "1"): "b"}
    pairs = zip(votes[::2], votes[1::2], strict=True)
    assert [row["better"] for row in rows] == [verdicts.get(both, "tie") for both in pairs]
    assert len({row["better"] for row in rows}) > 1
