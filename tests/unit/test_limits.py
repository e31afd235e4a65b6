"""`budget`: when a run has used enough."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.books import fold
from jobs.fingerprint import fingerprint
from jobs.ledger import Run, read_runs
from jobs.limits import BudgetSettings, Limits, deadline_of
from jobs.loading import load
from jobs.metering import Usage
from jobs.proposal import checked_identity
from pipelines.errors import SpecError
from tests.unit.stages import committed
from tests.unit.test_retry import settings, write_rows


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_reached_without_limits() -> None:
    assert Limits(BudgetSettings(), "out").reached(10**12, 1e12) is None


def test_each_limit_is_named_with_the_way_on() -> None:
    clock = Clock()
    budget = BudgetSettings(max_gpu_hours=2, max_output_tokens=1000, deadline="1h")
    limits = Limits(budget, "s3://b/out", clock)
    assert limits.reached(999, 7199) is None
    for said, words in (
        (limits.reached(1000, 0), ("budget.max_output_tokens", "1,000 of 1,000", "max_output_tokens=N")),
        (limits.reached(0, 7200), ("budget.max_gpu_hours", "2.00 GPU hours of 2", "max_gpu_hours=N")),
    ):
        assert said is not None
        assert said.exit_code == 1
        assert all(word in str(said).replace("output tokens ", "") for word in (*words, "s3://b/out"))
    clock.now += 3599
    assert limits.reached(0, 0) is None
    clock.now += 1
    assert "budget.deadline: 1h has come" in str(limits.reached(0, 0))


def test_a_deadline_is_a_moment_or_a_duration() -> None:
    assert deadline_of("90m", 100.0) == 100 + 5400
    assert deadline_of("1970-01-01T01:00:00+01:00", 5.0) == 0
    assert deadline_of("1970-01-01T00:00:10Z", 5.0) == 10


@pytest.mark.parametrize("wrong", ["2026-11-23T06:00:00", "tomorrow", "0h", "", "8"])
def test_other_deadlines_are_refused_by_key(tmp_path: Path, wrong: str) -> None:
    write_rows(tmp_path / "in")
    with pytest.raises(SpecError, match=r"budget\.deadline"):
        load({**settings(tmp_path), "budget": {"deadline": wrong}})


def test_a_budget_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    write_rows(tmp_path / "in")
    plain = load(settings(tmp_path))
    tight = load(
        {**settings(tmp_path), "budget": {"max_output_tokens": 5, "deadline": "2030-01-01T00:00:00Z"}}
    )
    assert fingerprint(checked_identity(plain)) == fingerprint(checked_identity(tight))
    json.dumps(tight.raw)


def test_earlier_runs_count(tmp_path: Path) -> None:
    write_rows(tmp_path / "in")
    output = committed(settings(tmp_path), run_id="earlier")
    parts = fold(output.storage, output.plan).parts
    made = sum(part.footer.stats.completion_tokens for part in parts)
    assert made > 0
    used = Usage(rows=0, failed=0, prompt_tokens=0, output_tokens=0, gpu_s=1800.0, cost_usd=None)
    runs = [
        Run(run_id=name, command="run", started_at=0, ended_at=1, state="failed", message="", usage=usage)
        for name, usage in (("earlier", used), ("killed", None), ("mine", used))
    ]
    assert read_runs(output.storage) == []
    tokens = Limits(BudgetSettings(max_output_tokens=made + 10), "out")
    tokens.add_earlier(parts, runs, "mine", 1.0)
    assert tokens.reached(9, 0) is None
    assert tokens.reached(10, 0) is not None
    hours = Limits(BudgetSettings(max_gpu_hours=1), "out")
    hours.add_earlier(parts, runs, "mine", 1.0)
    assert hours.reached(0, 1799) is None
    assert hours.reached(0, 1800) is not None


def test_answers_that_were_reused_cost_no_tokens(tmp_path: Path) -> None:
    write_rows(tmp_path / "in")
    output = committed(settings(tmp_path))
    (part, *_) = fold(output.storage, output.plan).parts
    made = part.footer.stats.completion_tokens
    stats = replace(part.footer.stats, tokens_reused=made - 3, repair_tokens=2)
    limits = Limits(BudgetSettings(max_output_tokens=6), "out")
    limits.add_earlier([replace(part, footer=replace(part.footer, stats=stats))], [], "mine", 1.0)
    assert limits.reached(0, 0) is None
    assert limits.reached(1, 0) is not None
