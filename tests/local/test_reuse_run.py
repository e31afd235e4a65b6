"""Answers kept by one `dray run` are found by another: two processes, which agree on nothing but the files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.inspect import report_of
from pipelines.settings import ModelSettings
from pipelines.storage import Storage
from pipelines.tokenizer import load_tokenizer
from tests.local.runs import REAL, TINY, content, dray, job, write_questions

pytestmark = pytest.mark.long

SAMPLED = {"temperature": 1.0, "seed": 0, "max_tokens": 24}


def test_a_later_run_asks_only_the_edited_judge(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=12)
    for name, rubric, hash_seed in (("first", "Is it right?", "1"), ("edited", "Is it polite?", "2")):
        judge = {"judge": {"column": "score", "rubric": rubric}}
        reuse = {"keep": True} if name == "first" else {"outputs": [str(tmp_path / "first")]}
        spec = job(tmp_path / "in", tmp_path / name, sampling=SAMPLED, steps=[judge], reuse=reuse)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        # What a set's order is, and with it that of anything made from one, differs between processes.
        ran = dray("run", str(tmp_path / f"{name}.yaml"), "--quiet", env={"PYTHONHASHSEED": hash_seed})
        assert ran.returncode == 0, ran.stderr
    stats = report_of(Storage(str(tmp_path / "edited"))).stats
    assert (stats.rows_in, stats.rows_reused) == (12, 12)
    texts = [[row["generated_text"] for row in content(tmp_path / name)] for name in ("first", "edited")]
    assert texts[0] == texts[1]


@pytest.mark.timeout(300)
def test_a_run_that_finds_everything_kept_loads_no_model(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=12)
    outputs = {"first": {"keep": True}, "again": {"outputs": [str(tmp_path / "first")]}}
    for name, reuse in outputs.items():
        steps = [{"filter": {"where": "completion_tokens > 0"}}] if name == "again" else []
        spec = job(tmp_path / "in", tmp_path / name, model=REAL, sampling=SAMPLED, steps=steps, reuse=reuse)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        # An engine of the second run would not come up: no machine has 100,000 GiB for its cache.
        env = {"VLLM_CPU_KVCACHE_SPACE": "100000"} if name == "again" else {}
        ran = dray("run", str(tmp_path / f"{name}.yaml"), "--quiet", env=env)
        assert ran.returncode == 0, ran.stderr
    first, again = (report_of(Storage(str(tmp_path / name))) for name in outputs)
    assert first.engines[0].startswith("vllm")
    assert (again.state, again.stats.rows_reused, again.engines, again.engine_start_s) == (
        "complete",
        12,
        (),
        0.0,
    )
    assert [r["generated_text"] for r in content(tmp_path / "again")] == [
        r["generated_text"] for r in content(tmp_path / "first")
    ]


@pytest.mark.timeout(200)
def test_a_row_that_kills_an_engine_which_started_for_it_is_found(tmp_path: Path) -> None:
    """By the process that Ray puts in the place of the dead one, which starts its engine at once."""
    asked = write_questions(tmp_path / "in", rows=12)
    poison = load_tokenizer(ModelSettings(source=str(TINY)))("☃", add_special_tokens=False)["input_ids"][-1]
    for name, reuse in (("first", {"keep": True}), ("grown", {"outputs": [str(tmp_path / "first")]})):
        spec = job(
            tmp_path / "in",
            tmp_path / name,
            model={"simulated": {"dies_of": poison} if name == "grown" else {}},
            shards={"rows": 6},
            reuse=reuse,
            errors={"max_error_rate": 0.5, "max_attempts": 1},
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        ran = dray("run", str(tmp_path / f"{name}.yaml"), "--quiet")
        assert ran.returncode == 0, ran.stderr
        new = pa.Table.from_pylist([{**asked.to_pylist()[0], "question": q} for q in ("What is ☃?", "Why?")])
        pq.write_table(new, tmp_path / "in" / "z.parquet")
    stats = report_of(Storage(str(tmp_path / "grown"))).stats
    assert (stats.rows_in, stats.rows_reused, stats.error_codes) == (14, 12, {"engine_crash": 1})
    (failed,) = [row for row in content(tmp_path / "grown") if row["error_code"]]
    assert failed["question"] == "What is ☃?"
