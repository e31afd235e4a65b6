"""Answers kept by one `dray run` are found by another: two processes, which agree on nothing but the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.inspect import report_of
from pipelines.storage import Storage
from tests.local.runs import REAL, content, dray, job, write_questions

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
