"""Several generations in one job, with real Ray and vLLM: two pools, typed answers, and bare vLLM's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from jobs import load, run
from jobs.inspect import verify
from pipelines.part import read_part
from pipelines.storage import Storage
from tests.local.runs import REAL, TINY, job, rows_of, write_questions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["number", "words"]},
        "value": {"type": "integer", "minimum": 0, "maximum": 9999},
        "digits": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
    },
    "required": ["kind", "value", "digits"],
    "additionalProperties": False,
}
#: The same model again, as an engine of its own.
SECOND = {
    "source": str(TINY),
    "engine": {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**27,
    },
}


@pytest.mark.long
def test_two_models_answer_in_one_job_and_typed_answers_are_of_their_schema(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=120)
    greedy = {"temperature": 0, "max_tokens": 48}
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        model=REAL,
        sampling=greedy,
        shards={"rows": 40},
        errors={"max_error_rate": 1.0},
        steps=[
            {"generate": {"column": "card", "prompt": {"template": "{{ question }}"}, "sampling": {**greedy, "output_schema": SCHEMA}}},
            {"generate": {"column": "again", "prompt": {"template": "{{ question }}"}, "sampling": greedy, "model": SECOND}},
        ],
    )  # fmt: skip
    report = run(load(settings))
    assert report.state == "complete"
    rows = rows_of(tmp_path / "out").to_pylist()
    assert sorted(row["question"] for row in rows) == sorted(asked["question"].to_pylist())
    # Another engine with the same model gives the same greedy answer to the same prompt.
    assert [row["again"] for row in rows] == [row["generated_text"] for row in rows]
    validator = Draft202012Validator(SCHEMA)
    for row in rows:
        assert json.loads(row["card"]) == row["card_parsed"]
        assert validator.is_valid(row["card_parsed"])

    storage = Storage(str(tmp_path / "out"))
    assert verify(storage, deep=True)["problems"] == []
    stats = report.stats
    spent = sum(
        row[name]
        for row in rows
        for name in ("completion_tokens", "card_completion_tokens", "again_completion_tokens")
    )
    assert stats.completion_tokens == spent
    part = next((tmp_path / "out" / "data").glob("*.parquet")).name
    assert read_part(storage, part).footer.provenance.engine.startswith("vllm ")
