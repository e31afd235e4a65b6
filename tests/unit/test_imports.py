"""What is not imported: torch and transformers take 6 s, Ray 1 s, which nobody should wait for who does not use them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLLECT = """
import contextlib, io, pytest
with contextlib.redirect_stdout(io.StringIO()):
    code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/unit", "tests/golden"])
assert code == 0, code
"""


def imported(code: str) -> set[str]:
    """Which of the large libraries a fresh interpreter has after this code."""
    # One that is kept out on purpose stands there as None.
    code += (
        "\nimport sys\nprint(*(n for n in ('ray', 'torch', 'transformers', 'vllm') if sys.modules.get(n)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_begins_and_loads_a_job_without_the_large_libraries() -> None:
    assert imported("import jobs.cli, jobs.loading") == set()


def test_a_worker_begins_without_a_models_libraries() -> None:
    assert imported("import pipelines.prepare, pipelines.generate, pipelines.commit") <= {"ray"}


@pytest.mark.slow
def test_the_quick_tests_are_collected_without_a_models_libraries() -> None:
    assert imported(COLLECT) <= {"ray"}
