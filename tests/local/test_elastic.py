"""`pool.replicas: {min, max}`: engines come with the work and go in the tail; on the simulated engine."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from jobs import load, run
from tests.local.runs import job, rows_of, write_questions

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.long, pytest.mark.timeout(300)]


def test_engines_come_with_the_work_and_go_in_the_tail(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1000)
    spec = job(
        tmp_path / "in",
        tmp_path / "out",
        shards={"rows": 100},  # 8 s of one engine's work
        pool={"replicas": {"min": 1, "max": 3}, "cpus_per_engine": 1, "shards_in_flight": 1},
        model={
            "backend": "simulated",
            "simulated": {"tokens_per_s": 300.0, "min_tokens": 24, "max_tokens": 24},
        },
    )
    free: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            free.append(ray.available_resources().get("CPU", 0.0))

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    try:
        run(load(spec))
    finally:
        over.set()
        watching.join()
    print(f"{time.monotonic() - began:.0f} s, free CPUs: {free}")
    rows = rows_of(tmp_path / "out")
    assert len(set(rows["row_id"].to_pylist())) == len(rows) == 1000
    footers = [
        json.loads(pq.read_metadata(part).metadata[b"dray"])
        for part in (tmp_path / "out" / "data").glob("*.parquet")
    ]
    assert len({footer["provenance"]["replica"] for footer in footers}) >= 2
    busiest = free.index(min(free))
    # Two engines of the three are given back before the last one is done.
    assert max(free[busiest:-4]) >= min(free) + 2
