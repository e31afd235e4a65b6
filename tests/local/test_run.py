"""A job from its file to its parts, in this process, on the simulated engine where the engine does not matter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs import Progress, load, plan, run
from jobs.inspect import report_of, status, verify
from jobs.report import Report
from pipelines.errors import ErrorBudgetSpent, InputError, JobIncomplete, OutputError, OutputLocked, SpecError
from pipelines.storage import Storage
from tests.local.runs import content, job, rows_of, write_questions
from tests.unit.stages import committed

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(180)]


def finished(settings: Mapping[str, Any], *overrides: str) -> Report:
    """An output to begin with: its parts by the stages alone, which takes half a second instead of ten, and a driver's books."""
    committed(settings)
    return run(load(settings, overrides))


def test_every_row_once_in_order_with_books_that_balance(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=500, files=3)
    seen: list[Progress] = []
    spec = load(job(tmp_path / "in", tmp_path / "out", shards={"rows": 64}))

    report = run(spec, observer=seen.append)

    out = tmp_path / "out"
    assert report.state == "complete"
    assert report.simulated
    assert (report.stats.rows_in, report.stats.rows_ok, report.stats.rows_failed) == (500, 500, 0)
    assert report.stats.balanced
    parts = sorted(path.name for path in (out / "data").glob("*.parquet"))
    assert len(parts) == report.shards_planned == 9  # 3 files of 167, 167 and 166 rows, cut at 64
    # Parts in order of their names hold the input's rows in the input's order.
    found = pa.concat_tables([pq.read_table(out / "data" / name) for name in parts])
    assert found["question"].to_pylist() == asked["question"].to_pylist()
    assert len(set(found["row_id"].to_pylist())) == 500
    assert found["row_id"][0].as_py() == f"{tmp_path}/in/q000.parquet#0"
    assert set(os.listdir(out / "data")) == {*parts, "_SUCCESS"}
    stats = pq.read_table(out / "stats" / "shards.parquet")
    assert sum(stats["rows_ok"].to_pylist()) == 500
    assert sum(stats["completion_tokens"].to_pylist()) == sum(found["completion_tokens"].to_pylist())
    assert not list((out / ".dray").rglob("*.parquet"))
    assert next(progress.phase for progress in seen) == "planning"
    assert seen[-1].phase == "done"
    assert seen[-1].stats.rows_in == 500
    assert verify(Storage(str(out)), deep=True)["ok"]


def test_a_finished_job_is_left_alone(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=80)
    settings = job(tmp_path / "in", tmp_path / "out")
    finished(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    notes: list[str] = []
    report = run(load(settings), observer=lambda progress: notes.append(progress.note))
    assert any(note.startswith("nothing to do: all") for note in notes)
    assert report.state == "complete"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()} == before
    assert [entry["state"] for entry in status(Storage(str(tmp_path / "out")))["runs"]] == ["succeeded"] * 2


def test_new_files_extend_the_job_and_changed_ones_are_refused_or_replaced(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=60)
    settings = job(tmp_path / "in", tmp_path / "out")
    finished(settings)
    first = {path.name for path in (tmp_path / "out" / "data").glob("*.parquet")}
    extra = write_questions(tmp_path / "more", rows=90).slice(60)
    pq.write_table(extra, tmp_path / "in" / "q001.parquet")

    assert plan(load(settings)).summary["new_shards"] == 1
    report = run(load(settings))
    assert report.stats.rows_in == 90
    assert first < {path.name for path in (tmp_path / "out" / "data").glob("*.parquet")}

    pq.write_table(extra.slice(0, 10), tmp_path / "in" / "q001.parquet")
    with pytest.raises(InputError, match=r"q001\.parquet: changed since it was planned.*on_changed"):
        run(load(settings))
    report = run(load(settings, ["input.on_changed=replace"]))
    assert report.stats.rows_in == 70
    found = rows_of(tmp_path / "out")
    assert len(found) == len(set(found["row_id"].to_pylist())) == 70
    assert verify(Storage(str(tmp_path / "out")), deep=True)["ok"]


def test_a_file_that_became_empty_takes_its_rows_along(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=20, files=2)
    settings = job(tmp_path / "in", tmp_path / "out", shards={"rows": 10})
    finished(settings)
    pq.write_table(asked.slice(0, 0), tmp_path / "in" / "q001.parquet")
    assert run(load(settings, ["input.on_changed=replace"])).stats.rows_in == 10
    assert len(rows_of(tmp_path / "out")) == 10
    assert verify(Storage(str(tmp_path / "out")), deep=True)["ok"]


def test_a_plan_that_was_extended_meanwhile_is_not_finished_by_an_older_proposal(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    settings = load(job(tmp_path / "in", tmp_path / "out"))
    stale = plan(settings)
    plan(settings).save()
    with pytest.raises(OutputLocked, match="extended this plan meanwhile"):
        stale.save()


def test_success_goes_before_the_plan_grows(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    settings = job(tmp_path / "in", tmp_path / "out")
    finished(settings)
    write_questions(tmp_path / "more", rows=10)
    (tmp_path / "more" / "q000.parquet").rename(tmp_path / "in" / "new.parquet")
    plan(load(settings)).save()  # and the driver dies here
    assert not (tmp_path / "out" / "data" / "_SUCCESS").exists()
    assert report_of(Storage(str(tmp_path / "out"))).state == "incomplete"


def test_the_users_own_files_are_left_alone(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my project")
    with pytest.raises(OutputError, match=r"README\.md, which no Dray job wrote"):
        run(load(job(tmp_path / "in", tmp_path / "out")))
    assert (tmp_path / "out" / "README.md").read_text() == "my project"


def test_a_damaged_or_missing_part_is_found(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=30)
    finished(job(tmp_path / "in", tmp_path / "out", shards={"rows": 10}))
    storage = Storage(str(tmp_path / "out"))
    first, second, third = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    first.write_bytes(b"PAR1" + b"\xff" * 200 + (150).to_bytes(4, "little") + b"PAR1")
    second.unlink()
    third.with_name("stray.parquet").write_bytes(third.read_bytes())
    verdict = verify(storage, deep=True)
    assert not verdict["ok"]
    assert verdict["missing"] == [first.name, second.name]
    assert any(first.name in problem and "damaged" in problem for problem in verdict["problems"])
    assert any("stray.parquet is not in the plan" in problem for problem in verdict["problems"])


def test_an_input_column_called_logprobs_is_carried(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=5)
    named = asked.append_column("logprobs", pa.array([str(i) for i in range(5)]))
    pq.write_table(named, tmp_path / "in" / "q000.parquet")
    finished(job(tmp_path / "in", tmp_path / "out"))
    assert sorted(rows_of(tmp_path / "out")["logprobs"].to_pylist()) == list("01234")


def test_a_different_spec_does_not_touch_the_output(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=20)
    finished(job(tmp_path / "in", tmp_path / "out"))
    other = load(job(tmp_path / "in", tmp_path / "out"), ["sampling.max_tokens=7"])
    with pytest.raises(OutputError, match=r"different spec \(sampling\.max_tokens: 48 → 7\)"):
        run(other)
    # What does not change a row's content is no different spec.
    run(
        load(job(tmp_path / "in", tmp_path / "out"), ["pool.shards_in_flight=1", "errors.max_error_rate=0.5"])
    )


def test_failed_rows_keep_their_place_until_the_budget_is_spent(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=100)
    texts = [None if i % 10 == 3 else text for i, text in enumerate(asked["question"].to_pylist())]
    broken = asked.set_column(0, "question", pa.array(texts))
    pq.write_table(broken, tmp_path / "in" / "q000.parquet")
    settings = job(tmp_path / "in", tmp_path / "out", shards={"rows": 20})

    with pytest.raises(ErrorBudgetSpent, match=r"(?s)of 100 rows failed.*missing_value"):
        run(load(settings))
    assert not (tmp_path / "out" / "data" / "_SUCCESS").exists()

    report = run(load(settings, ["errors.max_error_rate=0.1"]))
    assert report.state == "complete"
    assert report.stats.error_codes == {"missing_value": 10}
    found = rows_of(tmp_path / "out")
    assert len(found) == 100
    for row in found.to_pylist():
        assert (
            (row["error_code"] is None)
            == (row["generated_text"] is not None)
            == (row["question"] is not None)
        )


def test_a_job_that_begins_to_fail_stops_and_keeps_what_is_committed(tmp_path: Path) -> None:
    """Good rows, then bad ones of three kinds: over the latest rows there are too many long before there are in all."""
    asked = write_questions(tmp_path / "in", rows=400)
    bad = [None, "BOOM", "too long " * 600]
    texts = [
        bad[i % 7 % 3] if 200 <= i < 280 else text for i, text in enumerate(asked["question"].to_pylist())
    ]
    pq.write_table(asked.set_column(0, "question", pa.array(texts)), tmp_path / "in" / "q000.parquet")
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        prompt={"template": "{% if question == 'BOOM' %}{{ 1 // 0 }}{% endif %}{{ question }}"},
        shards={"rows": 20},
        pool={"shards_in_flight": 1},
        model={"simulated": {"tokens_per_s": 2000}},
        errors={
            "max_error_rate": 0.25,
            "window_rows": 60,
            "window_min_failed": 20,
            "shutdown_grace_s": 0,
        },
    )
    with pytest.raises(ErrorBudgetSpent) as spent:
        run(load(settings))
    lines = str(spent.value).splitlines()
    assert "of the latest 60 rows failed" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:4]] == [
        "missing_value",
        "prompt_error",
        "prompt_too_long",
    ]
    assert all(", for example " in line and "q000.parquet#2" in line for line in lines[1:4])
    found = status(Storage(str(tmp_path / "out")))
    assert found["runs"][0]["state"] == "failed"
    assert 10 < found["shards_committed"] < 20
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").glob("*.parquet")}

    report = run(load(settings, ["errors.window_rows=null", "model.simulated.tokens_per_s=1e6"]))
    assert report.stats.rows_failed == 80
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_failed_rows_may_go_to_a_folder_of_their_own(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=40)
    broken = asked.set_column(0, "question", pa.array([None, *asked["question"].to_pylist()[1:]]))
    pq.write_table(broken, tmp_path / "in" / "q000.parquet")
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        output={"failed_rows": "separate"},
        errors={"max_error_rate": 0.1},
    )
    report = finished(settings)
    assert (report.stats.rows_ok, report.stats.rows_failed) == (39, 1)
    assert len(rows_of(tmp_path / "out")) == 39
    assert rows_of(tmp_path / "out", "errors")["error_code"].to_pylist() == ["missing_value"]


def test_samples_filters_columns_and_renames(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=60)
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        input={"filter": "kind == 'sums'"},
        sampling={"temperature": 1.0, "n": 3, "seed": 7},
        output={"columns": ["question"], "rename": {"question": "asked"}},
    )
    report = run(load(settings))
    found = rows_of(tmp_path / "out")
    assert report.stats.rows_read == 60
    assert report.stats.rows_filtered > 0
    assert report.stats.samples == 3 * report.stats.rows_ok == len(found)
    assert found.column_names[:3] == ["asked", "row_id", "sample_index"]
    assert found["sample_index"].to_pylist() == [0, 1, 2] * report.stats.rows_ok
    # Rows keep the number that they have in the file, whatever the filter drops.
    kinds = pq.read_table(tmp_path / "in" / "q000.parquet")["kind"].to_pylist()
    numbers = {int(row_id.rpartition("#")[2]) for row_id in found["row_id"].to_pylist()}
    assert numbers == {i for i, kind in enumerate(kinds) if kind == "sums"}
    assert report.stats.prompt_tokens == sum(
        row["prompt_tokens"] for row in found.to_pylist() if row["sample_index"] == 0
    )


def test_an_output_is_the_next_jobs_input_once_its_result_columns_are_renamed(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=30)
    finished(job(tmp_path / "in", tmp_path / "first"))
    chained = job(tmp_path / "first", tmp_path / "second", prompt={"template": "Check: {{ generated_text }}"})
    with pytest.raises(SpecError, match=r"output\.rename"):
        run(load(chained))
    taken = [
        field
        for field in rows_of(tmp_path / "first").column_names
        if field not in ("id", "question", "answer", "kind")
    ]
    renamed = {
        **chained,
        "output": {**chained["output"], "rename": {name: f"first_{name}" for name in taken}},
    }
    run(load(renamed))
    found = rows_of(tmp_path / "second")
    assert found["first_generated_text"].to_pylist() != found["generated_text"].to_pylist()
    assert sorted(found["first_row_id"].to_pylist()) == rows_of(tmp_path / "first")["row_id"].to_pylist()


@pytest.mark.long
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_other_formats_give_the_same_answers(tmp_path: Path, ending: str) -> None:
    import gzip

    from pyarrow import csv

    asked = write_questions(tmp_path / "parquet", rows=50)
    (tmp_path / "in").mkdir()
    sink = pa.BufferOutputStream()
    if ending.startswith("csv"):
        csv.write_csv(asked, sink)
        data = sink.getvalue().to_pybytes()
    else:
        data = b"".join(json.dumps(row).encode() + b"\n" for row in asked.to_pylist())
    (tmp_path / "in" / f"q.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)

    run(load(job(tmp_path / "parquet", tmp_path / "out1")))
    run(load(job(tmp_path / "in", tmp_path / "out2")))
    columns = ["question", "answer", "generated_text", "prompt_tokens", "completion_tokens"]
    one, two = (
        ds.dataset(tmp_path / out / "data", format="parquet").to_table(columns=columns).sort_by("question")
        for out in ("out1", "out2")
    )
    assert one.to_pylist() == two.to_pylist()


@pytest.mark.long
def test_messages_and_functions_give_the_prompt_that_the_template_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = write_questions(tmp_path / "in", rows=20)
    chats = [[{"role": "user", "content": q}] for q in asked["question"].to_pylist()]
    texts = [json.dumps(chat) for chat in chats]
    pq.write_table(
        asked.append_column("chat", pa.array(chats)).append_column("text", pa.array(texts)),
        tmp_path / "in" / "q000.parquet",
    )
    package = tmp_path / "code" / "acme_prompts"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "qa.py").write_text(
        "def build(row):\n    return [{'role': 'user', 'content': row['question']}]\n"
    )
    monkeypatch.chdir(tmp_path / "code")
    prompts = {
        "template": {"template": "{{ question }}"},
        "column": {"prompt_column": "question"},
        "messages": {"messages_column": "chat"},
        "json": {"messages_column": "text"},
        "function": {"function": "acme_prompts.qa:build"},
    }
    found = {}
    for name, prompt in prompts.items():
        run(load(job(tmp_path / "in", tmp_path / name, prompt=prompt)))
        found[name] = rows_of(tmp_path / name)["generated_text"].to_pylist()
    assert all(texts == found["template"] for texts in found.values())


def test_a_function_that_raises_costs_its_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "in", rows=20)
    (tmp_path / "picky.py").write_text(
        "def build(row):\n    return {}[row['kind']] if row['kind'] == 'sums' else 'hello'\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = job(
        tmp_path / "in", tmp_path / "out", prompt={"function": "picky:build"}, errors={"max_error_rate": 1}
    )
    report = run(load(settings))
    kinds = pq.read_table(tmp_path / "in" / "q000.parquet")["kind"].to_pylist()
    assert report.stats.error_codes == {"prompt_error": kinds.count("sums")}
    failed = [row for row in rows_of(tmp_path / "out").to_pylist() if row["error_code"]]
    assert all("KeyError" in row["error_message"] for row in failed)


def test_a_shard_that_fails_for_good_ends_the_job_and_keeps_the_rest(tmp_path: Path) -> None:
    """A file that vanishes between plan and run: its shard fails at each attempt, the other one is committed."""
    write_questions(tmp_path / "in", rows=40, files=2)
    settings = job(tmp_path / "in", tmp_path / "out", errors={"max_attempts": 2}, shards={"rows": 20})
    job_ = load(settings)
    proposal = plan(job_)
    proposal.save()
    (tmp_path / "in" / "q001.parquet").unlink()
    with pytest.raises(JobIncomplete, match=r"1 of 2 shards have no part after 2 attempts.*q001\.parquet"):
        run(job_, relist=False)
    assert not (tmp_path / "out" / "data" / "_SUCCESS").exists()
    assert len(rows_of(tmp_path / "out")) == 20


@pytest.mark.long
def test_a_folder_called_pipelines_does_not_shadow_drays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts the driver's working directory first on the workers' path; Dray must not fall for it."""
    from tests.local.runs import dray

    write_questions(tmp_path / "in", rows=10)
    for name in ("pipelines", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    settings = job(tmp_path / "in", tmp_path / "out")
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    done = dray("run", "job.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stats"]["rows_ok"] == 10


@pytest.mark.long
def test_seeds_belong_to_rows_not_to_shards(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=50)
    sampling = {"temperature": 1.0, "seed": 11, "n": 2}
    run(load(job(tmp_path / "in", tmp_path / "a", sampling=sampling, shards={"rows": 7})))
    run(load(job(tmp_path / "in", tmp_path / "b", sampling=sampling, shards={"rows": 50})))
    run(load(job(tmp_path / "in", tmp_path / "c", sampling={**sampling, "seed": 12})))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")
