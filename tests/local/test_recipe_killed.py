"""Generate four answers, parse, verify, keep the shortest right one, drop duplicates, write the card: killed twice and
taken up again, against what a plain run of the same prompts says it must be."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.local.runs import DRAY, REAL, ROOT, dray, job, rows_of, write_questions

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SAMPLING = {"n": 4, "temperature": 2.0, "max_tokens": 32, "seed": 7}
STEPS = [
    {"parse": {"regex": r"^(?P<said>\S.*)$", "on_error": "drop"}},
    {"map": {"function": "examples.verifiers:exact", "adds": {"correct": "bool", "length": "int64"}}},
    {"filter": {"where": "correct"}},
    {"select": {"by": "length", "order": "smallest"}},
    {"dedup": {"columns": ["question", "said"]}},
]


def test_a_recipe_that_is_killed_and_taken_up_again_makes_the_same_dataset(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "some", rows=150)
    dice = random.Random(11)
    rows = [dice.randrange(150) for _ in range(400)]  # many of them more than once
    (tmp_path / "in").mkdir()
    pq.write_table(asked.take(pa.array(rows)), tmp_path / "in" / "questions.parquet")

    def job_file(name: str, steps: list[dict[str, Any]]) -> Path:
        settings = job(
            tmp_path / "in", tmp_path / name, model=REAL, sampling=SAMPLING, shards={"rows": 40}, steps=steps
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(settings))
        return path

    plain = dray("run", str(job_file("plain", [])), "--quiet", timeout=400)
    assert plain.returncode == 0, plain.stderr
    recipe, data = job_file("out", STEPS), tmp_path / "out" / "data"
    for kill in range(2):
        driver = subprocess.Popen([*DRAY, "run", str(recipe), "--quiet"], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.time() + 300
        while len(list(data.glob("*.parquet")) if data.exists() else []) < 2 + 3 * kill:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    last = dray("run", str(recipe), "--json", timeout=400)
    assert last.returncode == 0, last.stderr

    expected = _expected(rows_of(tmp_path / "plain").to_pylist())
    found = {
        (row["row_id"], row["sample_index"]): (row["said"], row["length"])
        for row in rows_of(tmp_path / "out").to_pylist()
    }
    assert found == expected
    assert 20 < len(found) < len(set(rows))
    verdict = dray("verify", str(tmp_path / "out"), "--deep", "--json")
    assert verdict.returncode == 0, verdict.stdout
    books = json.loads(verdict.stdout)
    assert (books["rows_in"], books["rows_ok"]) == (400, len(found))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(found):,} ok" in card
    assert "dedup" in card


def _expected(samples: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[str, int]]:
    """What the steps must leave of the plain run's samples."""
    best: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for row in samples:
        text = row["generated_text"]
        if text == row["answer"] and text and not text[0].isspace() and "\n" not in text:
            key = (len(text), row["sample_index"], row)
            if row["row_id"] not in best or key[:2] < best[row["row_id"]][:2]:
                best[row["row_id"]] = key
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for row_id in sorted(best, key=lambda row: int(row.rpartition("#")[2])):
        row = best[row_id][2]
        kept.setdefault((" ".join(row["question"].lower().split()), row["generated_text"].lower()), row)
    return {
        (row["row_id"], row["sample_index"]): (row["generated_text"], len(row["generated_text"]))
        for row in kept.values()
    }
