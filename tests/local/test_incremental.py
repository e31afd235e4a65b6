"""A daily job over partitions that arrive out of order, with its driver killed in between: every row is there once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from jobs.inspect import verify
from jobs.report import Report
from pipelines.storage import Storage
from tests.local.runs import DRAY, ROOT, job, rows_of, write_questions

pytestmark = pytest.mark.timeout(240)


def test_three_days_out_of_order_with_a_crash(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    asked = write_questions(tmp_path / "all", rows=240)

    def arrive(day: int, name: str, first: int, rows: int) -> None:
        folder = tmp_path / "in" / f"date=2026-11-2{day}"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(asked.slice(first, rows), folder / f".{name}")
        (folder / f".{name}").rename(folder / name)  # whole or not there

    out = tmp_path / "out"
    settings = job(
        f"{tmp_path}/in/date=*/*.parquet",
        out,
        prompt={"template": "{{ question }}", "system": "Today is ${run.date}."},
        shards={"rows": 20},
        schedule={"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
    )

    def on(day: int) -> Report:
        return run(load(settings, date=f"2026-11-2{day}"))

    def parts() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("data/*.parquet")}

    # Day 1: the driver is killed with a part or two committed and the rest in flight.
    arrive(1, "a.parquet", 0, 80)
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(settings))
    driver = subprocess.Popen(
        [*DRAY, "run", str(job_file), "--date=2026-11-21", "-q", "model.simulated.tokens_per_s=100"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not parts():
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    agents = [process for process in family if "agent" in " ".join(process.cmdline()).lower()]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for agent in agents:  # Ray leaves them behind (2.60)
        agent.kill()
    assert not (out / "data/_SUCCESS").exists()
    request.getfixturevalue("ray_cluster")  # not beside the driver's own

    # Day 2's data is late: the day's run finds day 3's instead, and what the crash has left.
    arrive(3, "c.parquet", 80, 60)
    assert on(2).stats.rows_in == 140
    first = parts()
    assert len(first) == 7
    # Day 3: the late day, and a late file of day 1.
    arrive(2, "b.parquet", 140, 60)
    arrive(1, "late.parquet", 200, 40)
    assert on(3).stats.rows_in == 240
    # Day 4: nothing is new, and nothing is done again.
    second = parts()
    assert on(4).stats.rows_in == 240
    assert parts() == second
    assert {path: second[path] for path in first} == first

    found: list[dict[str, Any]] = rows_of(out).to_pylist()
    assert Counter(row["question"] for row in found) == Counter(asked["question"].to_pylist())
    assert len({row["row_id"] for row in found}) == 240
    assert all(row["error_code"] is None for row in found)
    assert verify(Storage(str(out)), deep=True)["ok"]
