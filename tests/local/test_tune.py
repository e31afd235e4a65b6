"""`dray tune` by the command line: the sweep, the file that it writes, and a run that extends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.local.runs import DRAY, REAL, ROOT, dray, job, rows_of, write_questions

pytestmark = pytest.mark.timeout(400)


def write_job(folder: Path, **sections: Any) -> Path:
    write_questions(folder / "in", rows=120, files=2)
    path = folder / "job.yaml"
    path.write_text(json.dumps(job(folder / "in", folder / "out", **sections)))
    return path


def test_a_sweep_of_the_real_engine_and_a_run_that_extends_it(tmp_path: Path) -> None:
    """Bounded at 120 s, of which a start on an idle machine takes 15: more than one trial where the machine has time."""
    path, out = write_job(tmp_path, model=REAL), tmp_path / "tuned" / "tiny@cpu.yaml"

    done = dray("tune", str(path), "--seconds", "120", "--out", str(out), "--json", timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)

    assert found["engine"].startswith("vllm 0.")
    assert found["device"] == "cpu"
    assert found["prompts"] == 120
    speeds = [trial["tokens_per_s_per_gpu"] or 0 for trial in found["trials"]]
    assert found["best"]["tokens_per_s_per_gpu"] > 0
    assert found["best"]["tokens_per_s_per_gpu"] >= 0.97 * max(speeds)
    assert found["trials"][0]["start_s"] > 0
    assert yaml.safe_load(out.read_text()) == found["settings"]
    assert not (tmp_path / "out").exists()

    settings = json.loads(path.read_text())
    settings["extends"].append(str(out))
    path.write_text(json.dumps(settings))
    ran = dray("run", str(path), "--json")
    assert ran.returncode == 0, ran.stderr + ran.stdout
    report = json.loads(ran.stdout)
    assert report["stats"]["rows_ok"] == 120
    assert len(rows_of(tmp_path / "out")) == 120
    parts = report["engine_start_parts"]
    assert 0 < parts["import_s"] < report["engine_start_s"]
    assert 0 < parts["weights_s"] < report["engine_start_s"]
    assert (parts["compile_s"], parts["graphs_s"]) == (0, 0)  # enforce_eager, on a CPU


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path, out = write_job(tmp_path), tmp_path / "tuned.yaml"
    command = [*DRAY, "tune", str(path), "--seconds", "300", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "tokens/s" in first
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert str(out) in " ".join(rest.split())
    assert "SIMULATED" in out.read_text()
    assert yaml.safe_load(out.read_text())["model"]["engine"]["max_num_seqs"] == 64
    assert not (tmp_path / "out").exists()


def test_too_little_time_says_so_and_writes_nothing(tmp_path: Path) -> None:
    path, out = write_job(tmp_path, model={"simulated": {"start_s": 60}}), tmp_path / "tuned.yaml"
    began = time.monotonic()
    done = dray("tune", str(path), "--seconds", "5", "--out", str(out))
    assert done.returncode == 1
    assert "raise --seconds" in done.stderr
    assert not out.exists()
    assert time.monotonic() - began < 60  # the engine's start was not waited for
