"""A real engine that dies of a prompt under a running job. Engines that are killed from outside are tests/chaos's."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from tests.local.runs import job, rows_of, write_questions

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]


def test_a_prompt_that_kills_vllm_is_one_rows_error(tmp_path: Path) -> None:
    """On a CPU, vLLM 0.32 turns a seeded request's generator back after each chunk of a prefill, and dies of it."""
    asked = write_questions(tmp_path / "in", rows=60)
    texts = asked["question"].to_pylist()
    texts[41] = "Please think about this. " * 60  # 400 tokens: more than one step takes
    poisoned = asked.set_column(asked.schema.get_field_index("question"), "question", pa.array(texts))
    pq.write_table(poisoned, tmp_path / "in" / "q000.parquet")
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        model={
            "backend": "vllm",
            "engine": {
                "max_num_seqs": 7,
                "max_num_batched_tokens": 300,
                "enable_chunked_prefill": True,
                "enable_prefix_caching": False,
            },
        },
        sampling={"temperature": 0.5, "top_k": 1, "seed": 7, "max_tokens": 16},
        shards={"rows": 30},
        errors={"max_error_rate": 0.1, "max_attempts": 1},
    )
    report = run(load(settings))
    assert report.stats.error_codes == {"engine_crash": 1}
    assert (report.stats.rows_in, report.stats.rows_ok) == (60, 59)
    failed = [row for row in rows_of(tmp_path / "out").to_pylist() if row["error_code"]]
    assert [row["row_id"].rpartition("#")[2] for row in failed] == ["41"]
    assert "vLLM's engine process died" in failed[0]["error_message"]
    assert not list((tmp_path / "out" / ".dray").rglob("generate-*"))  # what was tried is of no use any more
