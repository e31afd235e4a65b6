"""`shards_in_flight: auto`: engines stay full, and one engine does not take the others' shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.step_model import LARGE, Request, StepEngine, run_shards
from benchmarks.workloads import WORKLOADS
from jobs.feeding import fed
from pipelines.lengths import HELD
from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings
from pipelines.waves import Wave


def in_flight(shards: int, rows: int | None, *, n: int = 1, seqs: int | None = None, **pool: Any) -> int:
    settings = PoolSettings.model_validate(pool)
    model = ModelSettings(source="m", engine={"max_num_seqs": seqs} if seqs else {})
    found = fed(settings, model, SamplingSettings(n=n), shards=shards, rows=rows).shards_in_flight
    assert found != "auto"
    return found


def seconds(size: int, shards_in_flight: int) -> float:
    """SIMULATED: 4,000 rows of long-tailed lengths through one engine of 512 requests, in shards of `size` rows."""
    table = WORKLOADS["W2"].table(4_000)
    lengths = zip(table["prompt"].to_pylist(), table["max_tokens"].to_pylist(), strict=True)
    rows = [Request(len(prompt), most, len(prompt) + round(HELD * most)) for prompt, most in lengths]
    engine = StepEngine(replace(LARGE, kv_tokens=1_700_000), lambda _: Wave(512, 384))
    cut = [rows[at : at + size] for at in range(0, len(rows), size)]
    return run_shards([engine], cut, shards_in_flight=shards_in_flight, learn=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 256, 512])
def test_small_shards_keep_an_engine_as_full_as_one_large_shard_does(size: int) -> None:
    shards = -(-4_000 // size)
    assert seconds(size, in_flight(shards, 4_000)) < 1.04 * seconds(4_000, 1)
    assert seconds(size, 3) > 1.04 * seconds(4_000, 1)


def test_an_engine_gets_no_more_than_its_fair_share() -> None:
    assert in_flight(24, 24 * 256) == 12
    assert in_flight(24, 24 * 256, replicas=4) == 6
    assert in_flight(24, 24 * 256, replicas={"min": 1, "max": 6}) == 4
    assert in_flight(24, 24 * 256, replicas=24) == 3


def test_what_an_engine_runs_at_once_decides() -> None:
    assert in_flight(100, 100 * 512) == 6
    assert in_flight(100, 100 * 512, seqs=256) == 3
    assert in_flight(100, 100 * 512, seqs=1024) == 12
    assert in_flight(100, 100 * 512, seqs=1024, n=4) == 3
    assert in_flight(100, 100 * 512, admission={"high": 1024}) == 12
    assert in_flight(100, 100 * 5_000) == 3


def test_few_rows_in_each_shard_do_not_mean_shards_without_end() -> None:
    assert in_flight(10_000, 10_000 * 5) == 64


def test_a_number_of_the_job_stays_and_unknown_rows_mean_three() -> None:
    assert in_flight(100, 100 * 5, shards_in_flight=2) == 2
    assert in_flight(100, None) == 3
    assert in_flight(100, 0) == 3
