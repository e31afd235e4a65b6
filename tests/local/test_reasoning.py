"""Reasoning, tool calls and judges behind a real engine's constraints, in one job with real Ray and vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from jobs.inspect import verify
from pipelines.part import read_part
from pipelines.storage import Storage
from pipelines.tokenizer import load_tokenizer
from tests.local.runs import REAL, job, rows_of
from tests.local.test_parsers import CALL, TOOL
from tests.tiny_models import thinking_model

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

#: Reasoning of any length, and two digits behind it.
REASONED = {
    "temperature": 1,
    "seed": 0,
    "max_tokens": 100,
    "reasoning_parser": "deepseek_r1",
    "structured_outputs": {"regex": "[0-9]{2}"},
    "repairs": 3,
}


def test_vllm_holds_constraints_for_the_answer_alone(tmp_path: Path) -> None:
    """A model that ends its reasoning at random: what it says then is of the form asked for, what it said before is not."""
    model, source = thinking_model(tmp_path / "model"), tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"question": [f"question {i}" for i in range(24)]}), source / "x.parquet")
    prompt = {"template": "{{ question }}"}
    called = {
        "column": "called",
        "prompt": {**prompt, "tools": [TOOL]},
        "sampling": {
            "temperature": 0,
            "max_tokens": 100,
            "tool_call_parser": "hermes",
            "structured_outputs": {"regex": re.escape(CALL).replace("1", "[0-9]")},
        },
    }
    short = {
        "column": "short",
        "prompt": prompt,
        "sampling": {"max_tokens": 1, "seed": 1, "reasoning_parser": "deepseek_r1"},
    }
    judge = {
        "column": "verdict",
        "rubric": "Is it good?",
        "choices": ["good", "bad"],
        "columns": ["question"],
    }
    settings = job(
        source,
        tmp_path / "out",
        prompt=prompt,
        model={
            **REAL,
            "source": str(model),
            "engine": {"max_model_len": 1024, "max_num_seqs": 32, "enforce_eager": True, "dtype": "float32"},
        },
        sampling=REASONED,
        steps=[{"generate": called}, {"generate": short}, {"judge": judge}],
    )
    report = run(load(settings))
    assert (report.state, report.stats.rows_ok) == ("complete", 24)
    rows = rows_of(tmp_path / "out").to_pylist()
    tokenizer = load_tokenizer(load(settings).spec.model)
    assert {re.fullmatch("[0-9]{2}", row["generated_text"]) is not None for row in rows} == {True}
    reasonings = [row["reasoning"] for row in rows if row["reasoning"] is not None]
    assert len(reasonings) > 12
    assert any(not re.fullmatch("[0-9]*", reasoning) for reasoning in reasonings)
    for row in rows:
        answer = len(tokenizer(row["generated_text"], add_special_tokens=False)["input_ids"])
        if row["reasoning"] is not None and row["reasoning_tokens"] is not None:
            assert 0 < row["reasoning_tokens"] < row["completion_tokens"] <= row["reasoning_tokens"] + 3
            assert row["completion_tokens"] > answer
    assert sum(row["reasoning_tokens"] is not None for row in rows) > 12

    assert {row["called"] for row in rows} == {""}
    for row in rows:
        (call,) = row["called_tool_calls"]
        assert call["name"] == "f"
        assert re.fullmatch(r'\{"a": [0-9]\}', call["arguments"])
        assert row["called_finish_reason"] == "stop"
    # One token is within the reasoning, or ends it: either way there is no answer, which is no failure.
    assert {(row["short"], row["short_finish_reason"], row["error_code"]) for row in rows} == {
        ("", "length", None)
    }
    assert any(row["short_reasoning"] for row in rows)
    assert {row["verdict"] for row in rows} <= {"good", "bad"}

    storage = Storage(str(tmp_path / "out"))
    assert verify(storage, deep=True)["problems"] == []
    part = next((tmp_path / "out" / "data").glob("*.parquet")).name
    assert read_part(storage, part).footer.provenance.engine.startswith("vllm ")
