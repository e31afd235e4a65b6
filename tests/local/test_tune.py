"""`dray tune` by the command line: the sweep, the file that it writes, and a run that extends it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.local.runs import DRAY, REAL, ROOT, dray, job, rows_of, write_questions

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


def write_job(folder: Path, **sections: Any) -> Path:
    write_questions(folder / "in", rows=120, files=2)
    path = folder / "job.yaml"
    path.write_text(json.dumps(job(folder / "in", folder / "out", **sections)))
    return path


def interrupted(path: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """A sweep that gets Ctrl-C when it has told of its first trial, however long that takes."""
    command = [*DRAY, "tune", str(path), "--seconds", "1000", "--window", "1.5", "--out", str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=100)
    assert "tokens/s" in first, first + rest
    return subprocess.CompletedProcess(command, process.returncode, stdout, first + rest)


def test_ctrl_c_keeps_what_the_real_engine_did_and_a_run_extends_it(tmp_path: Path) -> None:
    path, out = write_job(tmp_path, model=REAL), tmp_path / "tuned" / "tiny@cpu.yaml"

    done = interrupted(path, out)

    assert done.returncode == 130, done.stderr
    assert str(out) in "".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
    written = out.read_text()
    assert "with vllm 0." in written
    assert "← best" in written
    tuned = yaml.safe_load(written)
    assert tuned["model"]["engine"] == {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
    assert tuned["pool"]["admission"]["high"] <= 64

    settings = json.loads(path.read_text())
    settings["extends"].append(str(out))
    path.write_text(json.dumps(settings))
    ran = dray("run", str(path), "--json")
    assert ran.returncode == 0, ran.stderr + ran.stdout
    report = json.loads(ran.stdout)
    assert report["stats"]["rows_ok"] == len(rows_of(tmp_path / "out")) == 120
    parts = report["engine_start_parts"]
    assert 0 < parts["import_s"] < report["engine_start_s"]
    assert 0 < parts["weights_s"] < report["engine_start_s"]
    assert (parts["compile_s"], parts["graphs_s"]) == (0, 0)  # enforce_eager, on a CPU


def test_a_whole_sweep(tmp_path: Path) -> None:
    path, out = write_job(tmp_path), tmp_path / "tuned.yaml"

    done = dray(
        "tune", str(path), "--seconds", "1000", "--window", "0.5", "--out", str(out), "--json", timeout=380
    )

    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert (found["engine"], found["device"], found["prompts"]) == ("simulated", "cpu", 120)
    starts = [trial for trial in found["trials"] if trial["start_s"]]
    assert len({json.dumps(trial["admission"]) for trial in found["trials"]}) >= 5
    assert (
        len({(trial["max_num_seqs"], trial["max_num_batched_tokens"]) for trial in starts})
        == len(starts)
        >= 3
    )
    speeds = [trial["tokens_per_s_per_gpu"] for trial in found["trials"]]
    assert found["best"]["tokens_per_s_per_gpu"] * 1.03 >= max(speeds)
    assert yaml.safe_load(out.read_text()) == found["settings"]
    assert "SIMULATED" in out.read_text()
    assert not (tmp_path / "out").exists()


def test_too_little_time_says_so_and_writes_nothing(tmp_path: Path) -> None:
    path, out = write_job(tmp_path, model={"simulated": {"start_s": 60}}), tmp_path / "tuned.yaml"
    began = time.monotonic()
    done = dray("tune", str(path), "--seconds", "5", "--out", str(out))
    assert done.returncode == 1
    assert "raise --seconds" in done.stderr
    assert not out.exists()
    assert time.monotonic() - began < 60  # the engine's start was not waited for
