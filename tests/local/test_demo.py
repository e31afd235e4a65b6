"""The README's first command, as far as it goes after the set-up: questions in, answers checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.local.runs import ROOT, dray

pytestmark = pytest.mark.timeout(300)


@pytest.mark.long
def test_the_demo_job_answers_its_questions(tmp_path: Path) -> None:
    def python(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)

    questions = tmp_path / "questions" / "questions.parquet"
    made = python("examples/questions.py", str(questions), "--rows", "1000", "--files", "4")
    assert made.returncode == 0, made.stderr
    done = dray("run", "conf/jobs/demo.yaml", f"input.path={questions.parent}", f"output.path={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    # Plain lines on stderr when piped, the summary on stdout, and none of Ray's or vLLM's chatter in between.
    assert "running:" in done.stderr
    for noise in ("raylet", "WARNING", "INFO ", "vllm.", "\x1b"):
        assert noise not in done.stdout + done.stderr
    for word in ("tokens in / out", "latency p50 / p95", "1,000 ok, 0 failed of 1,000", "complete"):
        assert word in done.stdout
    checked = python("examples/check_answers.py", f"{tmp_path}/out", "--min", "0.99")
    assert checked.returncode == 0, checked.stdout
    plan = dray(
        "plan", "conf/jobs/demo.yaml", f"input.path={questions.parent}", f"output.path={tmp_path}/out"
    )
    assert "nothing to do" in plan.stdout
    preview = dray(
        "preview", "conf/jobs/demo.yaml", f"input.path={questions.parent}", "-n", "2", "--generate"
    )
    assert preview.returncode == 0, preview.stderr
    assert preview.stdout.count("→") == 2
