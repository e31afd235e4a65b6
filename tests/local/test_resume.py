"""A driver that is killed in mid-run loses the shards in flight and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.local.runs import DRAY, ROOT, content, dray, job, write_questions
from tests.processes import end_all, left_at_work

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def family(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The driver's Ray: raylet, agents, workers. Others may run their own beside this test."""
    return psutil.Process(driver.pid).children(recursive=True)


def test_kill_minus_nine_and_run_again(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=800, files=2)
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        shards={"rows": 50},
        model={"simulated": {"tokens_per_s": 1500}},
        pool={"shards_in_flight": 2},
    )
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(settings))
    undisturbed = dray(
        "run", str(job_file), f"output.path={tmp_path}/clean", "model.simulated.tokens_per_s=1e6"
    )
    assert undisturbed.returncode == 0, undisturbed.stderr

    data = tmp_path / "out" / "data"
    began = time.time()
    driver = subprocess.Popen(
        [*DRAY, "run", str(job_file), "--quiet"], cwd=ROOT, env={**os.environ}, stderr=subprocess.DEVNULL
    )
    while len(list(data.glob("*.parquet")) if data.exists() else []) < 5:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.time() - began < 120
        time.sleep(0.05)
    its_own = family(driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # the orphaned workers notice; what they commit until then is sound
    survivors = {path: path.stat().st_mtime_ns for path in data.glob("*.parquet")}
    assert 5 <= len(survivors) < 16
    assert not (data / "_SUCCESS").exists()
    status = json.loads(dray("status", str(tmp_path / "out"), "--json").stdout)
    assert status["shards_committed"] == len(survivors)

    again = dray("run", str(job_file), "--json")
    assert again.returncode == 0, again.stderr
    # Finished shards were not run again: their parts are the very same files, from the first run.
    assert {path: path.stat().st_mtime_ns for path in survivors} == survivors
    runs = {pq.read_table(path)["run_id"][0].as_py() for path in data.glob("*.parquet")}
    assert len(runs) == 2
    report = json.loads(again.stdout)
    assert report["stats"]["rows_in"] == 800
    assert [run["state"] for run in report["runs"]] == ["running", "running"]  # the second is this one

    assert content(tmp_path / "out") == content(tmp_path / "clean")
    verdict = dray("verify", str(tmp_path / "out"), "--deep", "--json")
    assert verdict.returncode == 0, verdict.stdout
    assert not left_at_work(its_own)
    end_all(its_own)


@pytest.mark.parametrize(
    ("how", "grace_s"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 100), ("cancel", 0)],
    ids=["Ctrl-C", "SIGTERM", "cancel"],
)
def test_a_stopped_run_says_so_and_can_go_on(tmp_path: Path, how: signal.Signals | str, grace_s: int) -> None:
    """With time to finish, what was begun is committed; without, it is given up and nothing is lost."""
    write_questions(tmp_path / "in", rows=600)
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        shards={"rows": 25},
        model={"simulated": {"tokens_per_s": 300}},  # half a minute of work, five seconds in flight
        errors={"shutdown_grace_s": grace_s},
    )
    job_file, out = tmp_path / "job.yaml", tmp_path / "out"
    job_file.write_text(json.dumps(settings))
    driver = subprocess.Popen(
        [*DRAY, "run", str(job_file)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    began = time.time()
    while not list(out.glob("data/*.parquet")):
        assert driver.poll() is None
        assert time.time() - began < 120
        time.sleep(0.05)
    if isinstance(how, signal.Signals):
        driver.send_signal(how)
    else:
        asked = dray("cancel", str(out), "--json")
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["pid"] == driver.pid
    _, words = driver.communicate(timeout=180)
    assert driver.returncode == 130, words
    assert f"error: {'cancelled by' if how == 'cancel' else f'stopped by {how.name}'}" in words
    assert f"shards in flight have {grace_s} s to finish" in words
    assert "Traceback" not in words
    parts = {path.name.split("-")[2].removesuffix(".parquet") for path in out.glob("data/*.parquet")}
    begun = {path.parent.name for path in out.glob(".dray/attempts/*/generate-*.json")}
    assert parts <= begun
    assert len(begun) < 24
    assert (begun == parts) == (grace_s > 0)
    if how == signal.SIGTERM:
        return  # the way back is the same
    status = json.loads(dray("status", str(out), "--json").stdout)
    assert status["locked_by"] is None
    assert (status["runs"][0]["state"], status["shards_committed"]) == ("interrupted", len(parts))
    if how == "cancel":
        nobody = dray("cancel", str(out))
        assert nobody.returncode == 2
        assert "no run writes this output now" in nobody.stderr
        return
    done = dray("resume", str(out), "model.simulated.tokens_per_s=1e6", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stats"]["rows_in"] == 600
