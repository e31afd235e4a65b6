"""A budget stops a run cleanly, the next one goes on, and the ledgers tell what both used; estimates with a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import load, run
from jobs.estimate import estimate
from jobs.inspect import report_of, verify
from jobs.ledger import read_runs
from jobs.shared_ledger import LEDGER_VARIABLE
from jobs.team_runs import team_runs
from pipelines.errors import LimitReached
from pipelines.storage import Storage
from tests.local.runs import REAL, dray, job, rows_of, write_questions

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(240)]

#: 20 shards of 20 rows, some 300 tokens and a second each.
SLOW = {
    "shards": {"rows": 20},
    "pool": {"shards_in_flight": 1},
    "model": {"backend": "simulated", "simulated": {"tokens_per_s": 300}},
}


def test_output_tokens_count_over_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEDGER_VARIABLE, str(tmp_path / "ledger"))
    write_questions(tmp_path / "in", rows=400)
    spec = job(tmp_path / "in", tmp_path / "out", **SLOW, cost={"gpu_hour_usd": 2.5})
    limited = [f"budget.{key}" for key in ("max_output_tokens=900", "deadline=1h")]

    with pytest.raises(
        LimitReached, match=r"budget\.max_output_tokens: .* of 900 .*the same command with"
    ) as stop:
        run(load(spec, limited))
    assert stop.value.exit_code == 1
    out = Storage(str(tmp_path / "out"))
    (first,) = read_runs(out)
    assert first.state == "interrupted"
    assert first.usage is not None
    assert 900 <= first.usage.output_tokens < 3000
    assert (first.usage.gpu_s, first.usage.cost_usd) == (0.0, 0.0)
    assert first.usage.rows == len(rows_of(tmp_path / "out"))
    assert not (tmp_path / "out" / "data" / "_SUCCESS").exists()

    with pytest.raises(LimitReached):  # at once: what the first run made counts
        run(load(spec, limited))
    assert len(rows_of(tmp_path / "out")) == first.usage.rows

    more = ["budget.max_output_tokens=null", "model.simulated.tokens_per_s=100000"]
    resumed = dray("resume", str(tmp_path / "out"), *more)
    assert resumed.returncode == 0, resumed.stderr
    assert verify(out, deep=True)["ok"]
    runs = read_runs(out)
    assert sum(one.usage.output_tokens for one in runs if one.usage) == report_of(out).stats.completion_tokens
    shared = team_runs(Storage(str(tmp_path / "ledger")))
    assert [one.state for one in shared] == ["succeeded", "interrupted", "interrupted"]
    assert [one.usage for one in reversed(shared)] == [one.usage for one in runs]
    assert not any("{{" in path.read_text() for path in (tmp_path / "ledger").rglob("*.json"))


def test_a_limit_that_the_last_of_the_work_reaches_stops_nothing(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=60)
    tokens = run(load(job(tmp_path / "in", tmp_path / "free"))).stats.completion_tokens
    limit = [f"budget.max_output_tokens={tokens - 1}"]
    assert run(load(job(tmp_path / "in", tmp_path / "out"), limit)).state == "complete"
    assert (tmp_path / "out" / "data" / "_SUCCESS").exists()


def test_a_deadline_stops_a_run(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=400)
    with pytest.raises(LimitReached, match=r"budget\.deadline: 4s has come"):
        run(load(job(tmp_path / "in", tmp_path / "out", **SLOW, budget={"deadline": "4s"})))
    assert json.loads(max((tmp_path / "out/.dray/runs").glob("*/*.json")).read_text())["usage"]
    assert run(load(job(tmp_path / "in", tmp_path / "out", shards={"rows": 20}))).state == "complete"


def test_a_real_model_s_tokens_lie_within_the_estimate(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=400, files=4)
    spec = load(job(tmp_path / "in", tmp_path / "out", model=REAL))
    found = estimate(spec, rows=80)
    stats = run(spec).stats
    assert found.prompt_tokens.low <= stats.prompt_tokens <= found.prompt_tokens.high
    assert found.output_tokens.low <= stats.completion_tokens <= found.output_tokens.high
    assert found.failed == 0
