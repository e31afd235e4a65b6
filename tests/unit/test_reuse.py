"""Equal greedy prompts are answered once; and what rows say about their making."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load
from jobs.inspect import verify
from jobs.preview import preview
from pipelines.part import read_part
from pipelines.seeds import row_seed
from pipelines.tokenizer import load_tokenizer
from tests.local.runs import job, rows_of
from tests.unit.stages import Output, committed

ASKED = ["a", "b", "a", "c", "a", "b"] * 2


def answered(folder: Path, name: str = "out", **sections: Any) -> Output:
    source = folder / "in"
    source.mkdir(exist_ok=True)
    pq.write_table(pa.table({"question": ASKED, "limit": [4, 4, 4, 4, 9, None] * 2}), source / "x.parquet")
    return committed(job(source, folder / name, **{"shards": {"rows": 6}, **sections}))


def stats_of(output: Output) -> Any:
    first, *others = [read_part(output.storage, shard.part_name).footer.stats for shard in output.plan.shards]
    return sum(others, first)


@pytest.mark.parametrize("limited", [False, True])
def test_a_greedy_prompt_is_answered_once(tmp_path: Path, limited: bool) -> None:
    limit = {"max_tokens_column": "limit"} if limited else {}
    output = answered(tmp_path, sampling={"temperature": 0, "max_tokens": 24, **limit})
    rows = rows_of(output.folder).to_pylist()
    assert sorted(row["question"] for row in rows) == sorted(ASKED)
    keys = {(row["question"], row["limit"] if limited else None): row["generated_text"] for row in rows}
    assert all(
        row["generated_text"] == keys[row["question"], row["limit"] if limited else None] for row in rows
    )
    stats = stats_of(output)
    assert (stats.rows_reused, stats.rows_ok, stats.latency_s.count) == (12 - len(keys), 12, len(keys))
    assert stats.completion_tokens == sum(row["completion_tokens"] for row in rows)
    assert 0 < stats.tokens_reused < stats.completion_tokens
    assert verify(output.storage, deep=True)["problems"] == []


def test_sampled_prompts_are_each_answered(tmp_path: Path) -> None:
    stats = stats_of(answered(tmp_path, sampling={"temperature": 0.7, "max_tokens": 24, "seed": 3}))
    assert (stats.rows_reused, stats.tokens_reused, stats.latency_s.count) == (0, 0, 12)


def test_rows_say_what_made_them_where_that_is_asked_for(tmp_path: Path) -> None:
    sampling = {"temperature": 0.7, "max_tokens": 8, "seed": 3}
    settings = {"sampling": sampling, "output": {"path": str(tmp_path / "out"), "provenance": True}}
    output = answered(tmp_path, **settings)
    assert "model" not in rows_of(answered(tmp_path, "plain", sampling=sampling).folder).column_names
    loaded = load(output.settings)
    tokenizer = load_tokenizer(loaded.spec.model)
    prompts = {row["row_id"]: row["prompt"] for row in preview(loaded, rows=12, generate=False)}
    for row in rows_of(output.folder).to_pylist():
        ids = tokenizer(prompts[row["row_id"]], add_special_tokens=False)["input_ids"]
        assert row["prompt_sha256"] == hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
        assert (row["model"], row["model_revision"]) == ("tiny-model", None)
        assert row["seed"] == row_seed(3, row["row_id"])
    assert verify(output.storage, deep=True)["problems"] == []
