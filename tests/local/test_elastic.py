"""`pool.replicas: {min, max}`: engines come with the work and go in the tail; on the simulated engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs import Progress, load, run
from tests.local.runs import job, rows_of, write_questions

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.long, pytest.mark.timeout(300)]


def test_engines_come_with_the_work_and_go_in_the_tail(tmp_path: Path) -> None:
    # Eight seconds of one engine's work in each shard but the last, which takes it thirty.
    asked = write_questions(tmp_path / "in", rows=700)
    lengths = pa.array([24] * 600 + [96] * 100, pa.int32())
    pq.write_table(asked.append_column("length", lengths), tmp_path / "in" / "q000.parquet")
    spec = job(
        tmp_path / "in",
        tmp_path / "out",
        shards={"rows": 100},
        sampling={"max_tokens_column": "length"},
        pool={"replicas": {"min": 1, "max": 3}, "cpus_per_engine": 1, "shards_in_flight": 1},
        model={
            "backend": "simulated",
            "simulated": {"tokens_per_s": 300.0, "min_tokens": 96, "max_tokens": 96},
        },
    )
    free: list[float] = []
    """CPUs while shards were left to do."""
    done = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if done[0] < 7:
                free.append(ray.available_resources().get("CPU", 0.0))

    def watch_progress(progress: Progress) -> None:
        done[0] = progress.shards_done

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run(load(spec), observer=watch_progress)
    finally:
        over.set()
        watching.join()
    rows = rows_of(tmp_path / "out")
    assert len(set(rows["row_id"].to_pylist())) == len(rows) == 700
    footers = [
        json.loads(pq.read_metadata(part).metadata[b"dray"])
        for part in (tmp_path / "out" / "data").glob("*.parquet")
    ]
    assert len({footer["provenance"]["replica"] for footer in footers}) >= 2
    busiest = free.index(min(free))
    assert max(free[busiest:]) >= min(free) + 2  # two engines were given back while one still had a shard
