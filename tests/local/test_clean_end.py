"""What a run leaves of its processes: nothing, also of an engine whose ranks are processes of their own."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.local.runs import DRAY, REAL, ROOT, job, rows_of, write_questions
from tests.processes import still_runs

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def test_a_tensor_parallel_run_ends_with_its_last_process(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=20)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    settings = job(tmp_path / "in", tmp_path / "out", model={**REAL, "engine": ranks})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    started, names = set[psutil.Process](), set[str]()
    with subprocess.Popen([*DRAY, "run", str(tmp_path / "job.yaml"), "--quiet"], cwd=ROOT) as process:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                started.update(psutil.Process(process.pid).children(recursive=True))
                names |= {child.name() for child in started if still_runs(child)}
            time.sleep(0.2)
        left = [child for child in started if still_runs(child) and child.name().startswith("VLLM::")]
    assert process.returncode == 0
    assert {"VLLM::Worker_TP0", "VLLM::Worker_TP1"} <= names
    assert not left
    assert rows_of(tmp_path / "out").num_rows == 20
