"""Equal prompts over two engines of real Ray are asked once, and without the actor that they share by a job is done as well."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import pipelines.run
from jobs import load, run
from pipelines.contracts import Work
from pipelines.shared_answers import ShelfThere, shelf_beside_driver
from tests.local.runs import content, job
from tests.unit.stages import committed

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow, pytest.mark.timeout(240)]

#: Forty prompts in twelve shards of twenty rows.
ASKED = [f"What is {n * n % 97 % 40}?" for n in range(240)]
DISTINCT = len(set(ASKED))


def asking(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(pa.table({"question": ASKED}), folder / "in" / "x.parquet")
    simulated = {"tokens_per_s": 2000, "min_tokens": 24, "max_tokens": 24}
    more = {"pool": {"replicas": 2, "cpus_per_engine": 1}, "shards": {"rows": 20}, **sections}
    return job(folder / "in", folder / name, model={"simulated": simulated}, **more)


def engines_of(output: Path) -> set[str]:
    parts = [pq.read_metadata(part).metadata for part in (output / "data").glob("*.parquet")]
    return {json.loads(part[b"dray"])["provenance"]["replica"] for part in parts}


def test_two_engines_ask_equal_prompts_once(tmp_path: Path) -> None:
    greedy = {"temperature": 0, "max_tokens": 24}
    again = {"generate": {"column": "again", "prompt": {"template": "{{ question }}?"}, "sampling": greedy}}
    stats = run(load(asking(tmp_path, "shared", steps=[again]))).stats
    assert len(engines_of(tmp_path / "shared")) == 2
    assert (stats.latency_s.count, stats.rows_reused) == (2 * DISTINCT, 480 - 2 * DISTINCT)
    alone = asking(tmp_path, "alone", steps=[again], reuse={"equal_prompts": "none"})
    committed(alone)
    assert run(load(alone)).stats.latency_s.count == 480
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def test_a_job_goes_on_without_the_actor_that_its_engines_share_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone before the first claim."""

    @contextlib.contextmanager
    def killed(work: Work) -> Iterator[ShelfThere | None]:
        with shelf_beside_driver(work) as shelf:
            assert shelf is not None
            ray.kill(shelf._actor)
            yield shelf

    monkeypatch.setattr(pipelines.run, "shelf_beside_driver", killed)
    report = run(load(asking(tmp_path, "out")))
    assert (report.state, report.stats.rows_ok) == ("complete", 240)
    assert report.stats.latency_s.count > DISTINCT
