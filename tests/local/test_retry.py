"""`dray retry-failed` and `dray verify --repair` as a user has them: real Ray, killed drivers, a real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import Progress, load, retry_failed, run
from jobs.inspect import status, verify
from jobs.target import job_of
from pipelines.errors import ErrorBudgetSpent, OutputError, SpecError
from pipelines.storage import Storage
from tests.local.runs import DRAY, REAL, ROOT, content, dray, job, rows_of, write_questions
from tests.unit.stages import committed

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

ENOUGH = "model.engine.max_model_len=4000"


def write_rows(folder: Path, rows: int, every: int = 10) -> pa.Table:
    """Questions, every so many far too long for 100 tokens."""
    asked = write_questions(folder, rows=rows)
    texts = ["why " * 300 if i % every == 3 else text for i, text in enumerate(asked["question"].to_pylist())]
    spoiled = asked.set_column(asked.column_names.index("question"), "question", pa.array(texts))
    pq.write_table(spoiled, folder / "q000.parquet")
    return asked


def settings(folder: Path, target: str = "out", **sections: Any) -> dict[str, Any]:
    made = job(folder / "in", folder / target, **{"shards": {"rows": 20}, **sections})
    return {**made, "model": {**made["model"], "engine": {"max_model_len": 100}}}


def test_an_output_over_its_budget_gets_within_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "in", rows=100)
    out, storage = tmp_path / "out", Storage(str(tmp_path / "out"))
    committed(settings(tmp_path))
    run(load(settings(tmp_path), ["errors.max_error_rate=1"]))
    strict = "errors.max_error_rate=0.01"
    stored = (out / ".dray" / "spec.json").read_bytes()

    # An output that was accepted stays so, whatever a retry would allow.
    notes: list[str] = []
    report = retry_failed(
        job_of(str(out), [strict]),
        error_codes=["engine_crash"],
        observer=lambda progress: notes.append(progress.note),
    )
    assert report.state == "complete"
    assert any(note.startswith("nothing to retry: no committed row") for note in notes)

    # Nothing changed, nothing gained; and said so, with what is there merged.
    (out / "data" / "_SUCCESS").unlink()
    with pytest.raises(ErrorBudgetSpent, match=r"10 of 100 rows failed[^$]*`dray retry-failed "):
        retry_failed(job_of(str(out), [strict]), run_id="in-vain")
    assert not (out / "data" / "_SUCCESS").exists()
    assert verify(storage, deep=True)["ok"]

    seen: list[Progress] = []
    report = retry_failed(job_of(str(out), [ENOUGH, strict]), run_id="with-room", observer=seen.append)
    assert report.state == "complete"
    assert (report.stats.rows_ok, report.stats.rows_failed) == (100, 0)
    assert (out / "data" / "_SUCCESS").exists()
    assert (out / ".dray" / "spec.json").read_bytes() == stored
    assert verify(storage, deep=True)["ok"]
    assert "| rows | 100 ok, 0 failed of 100 |" in (out / "README.md").read_text()
    assert pq.read_table(out / "stats" / "shards.parquet")["retries"].to_pylist() == [2] * 5
    assert seen[-1].phase == "done"
    assert (seen[-1].shards_total, seen[-1].shards_done, seen[-1].stats.rows_ok) == (5, 5, 10)
    assert not (out / ".dray" / "attempts").exists() or not list((out / ".dray" / "attempts").rglob("*.json"))
    runs = status(storage)["runs"]
    assert [run_["command"] for run_ in runs] == ["run"] + ["retry-failed"] * 3
    record = json.loads((out / ".dray" / "runs" / "with-room" / "000000.json").read_text())
    assert record["spec"]["model"]["engine"]["max_model_len"] == 4000

    by = {row["run_id"] for row in rows_of(out).to_pylist() if row["question"].startswith("why why")}
    assert by == {"with-room"}

    before = {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    assert retry_failed(job_of(str(out))).state == "complete"
    assert {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()} == before


def test_what_a_retry_may_not_change_is_one_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "in", rows=20)
    committed(settings(tmp_path))
    out = str(tmp_path / "out")
    for override, words in {
        "input.filter=kind == 'sums'": "input.filter: nothing → ",
        "input.path=/elsewhere": "input.path: ",
        "output.columns=[question]": 'output.columns: "all" → ',
        "output.rename.question=asked": "output.rename.question: nothing → ",
        "output.failed_rows=separate": "output.failed_rows: ",
        "sampling.logprobs=2": "sampling.logprobs: nothing → 2",
        "shards.rows=7": "shards.rows: 20 → 7",
        "prompt.template={{ quest }}": "unknown column 'quest'",
    }.items():
        with pytest.raises(SpecError) as refused:
            retry_failed(job_of(out, [override]))
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(OutputError, match="is no output of a Dray job"):
        retry_failed(load(settings(tmp_path, "other")))
    done = dray("retry-failed", out, "--where", "error_code=prompt_to_long")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown error_code 'prompt_to_long'; did you mean 'prompt_too_long'?" in done.stderr


@pytest.mark.long
def test_a_retry_whose_driver_is_killed_and_another_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "in", rows=200, every=4)
    spec = {**settings(tmp_path), "errors": {"max_error_rate": 1}}
    run(load(spec))
    out = tmp_path / "out"
    before = {path.name: path.stat().st_mtime_ns for path in (out / "data").glob("*.parquet")}
    slow = ["model.simulated.tokens_per_s=60", "pool.admission.high=4"]
    driver = subprocess.Popen(
        [*DRAY, "retry-failed", str(out), ENOUGH, *slow, "--quiet"],
        cwd=ROOT,
        env={**os.environ},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    began = time.time()

    def merged() -> int:
        return sum(path.stat().st_mtime_ns != before[path.name] for path in (out / "data").glob("*.parquet"))

    try:
        while not merged():
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.time() - began < 150
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert verify(Storage(str(out)), deep=True)["ok"]

    report = retry_failed(job_of(str(out), [ENOUGH]), run_id="second")
    assert (report.stats.rows_ok, report.stats.rows_failed) == (200, 0)
    assert len({row["run_id"] for row in rows_of(out).to_pylist()}) == 3
    assert len({row["row_id"] for row in rows_of(out).to_pylist()}) == 200
    assert verify(Storage(str(out)), deep=True)["ok"]


@pytest.mark.long
def test_damaged_parts_are_moved_away_what_is_left_is_retried_and_the_rest_resumed(tmp_path: Path) -> None:
    write_rows(tmp_path / "in", rows=100)
    out = tmp_path / "out"
    run(load(settings(tmp_path), ["errors.max_error_rate=1"]))
    clean = content(out)
    truncated, flipped, gone, _, copied = sorted((out / "data").glob("*.parquet"))
    truncated.write_bytes(truncated.read_bytes()[:-30])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 4] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    (out / "data" / "stray.parquet").write_bytes(copied.read_bytes())

    found = dray("verify", str(out), "--deep", "--repair", "--json")
    assert found.returncode == 1, found.stderr
    verdict = json.loads(found.stdout)
    assert verdict["missing"] == [truncated.name, flipped.name, gone.name]
    assert verdict["problems"] == []
    assert not (out / "data" / "_SUCCESS").exists()
    assert len(rows_of(out)) == 40

    notes: list[str] = []
    report = retry_failed(job_of(str(out), [ENOUGH]), observer=lambda progress: notes.append(progress.note))
    assert report.state == "incomplete"
    assert (report.stats.rows_ok, report.stats.rows_failed) == (40, 0)
    assert "3 shards are not committed yet: `dray resume` runs them" in notes

    report = run(job_of(str(out)), relist=False)
    assert (report.state, report.stats.rows_failed) == ("complete", 6)
    answers = {row["row_id"]: row["generated_text"] for row in content(out)}
    assert len(answers) == 100
    assert all(answers[row["row_id"]] == row["generated_text"] for row in clean if not row["error_code"])
    whole = dray("verify", str(out), "--deep")
    assert whole.returncode == 0, whole.stdout
    assert "in order" in whole.stdout


@pytest.mark.long
def test_on_the_real_engine(tmp_path: Path) -> None:
    asked = write_rows(tmp_path / "in", rows=60, every=6)
    spec = job(
        tmp_path / "in",
        tmp_path / "out",
        model={**REAL, "engine": {"max_model_len": 200}},
        prompt={"template": "{{ question }}"},
        errors={"max_error_rate": 0.5},
        shards={"rows": 20},
    )
    report = run(load(spec))
    assert report.stats.error_codes == {"prompt_too_long": 10}
    # The long prompts say nothing that the questions' column does not; cut short they can be answered.
    report = retry_failed(
        job_of(str(tmp_path / "out"), ["prompt.template={{ kind }} {{ question[:40] }}"]), run_id="second"
    )
    assert not report.simulated
    assert (report.stats.rows_ok, report.stats.rows_failed) == (60, 0)
    found = pa.concat_tables(
        pq.read_table(path) for path in sorted((tmp_path / "out" / "data").glob("*.parquet"))
    )
    assert found["answer"].to_pylist() == asked["answer"].to_pylist()  # all rows, in their places
    second = [row for row in found.to_pylist() if row["run_id"] == "second"]
    assert len(second) == 10
    assert all(row["question"].startswith("why ") and row["completion_tokens"] > 0 for row in second)
    right = sum(
        row["generated_text"] == row["answer"] for row in found.to_pylist() if row["run_id"] != "second"
    )
    assert right >= 49
    assert verify(Storage(str(tmp_path / "out")), deep=True)["ok"]
