"""Failed rows run again and merged, stage by stage: whatever comes late, twice, in between or never, the rows are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.books import clear_unreferenced_errors, fold
from jobs.inspect import verify
from jobs.retry import parse_where
from pipelines.attempts import Attempts
from pipelines.errors import SpecError
from pipelines.part import Footer, read_part
from pipelines.storage import Storage
from tests.local.runs import content, job, rows_of, write_questions
from tests.unit.stages import Output, committed, generated, merge, run

pytestmark = pytest.mark.slow


#: Rows whose prompt is too long at first, rows that never get one; of 24 rows in shards of 8.
LONG, ABSENT = (1, 8, 9, 22), (4, 23)
#: What the first run may take, and the retry.
SHORT, ENOUGH = "model.engine.max_model_len=100", "model.engine.max_model_len=4000"


def write_rows(folder: Path, form: str = "parquet", files: int = 1) -> None:
    asked = write_questions(folder, rows=24).to_pylist()
    for i, row in enumerate(asked):
        row["question"] = "why " * 300 if i in LONG else None if i in ABSENT else row["question"]
    (folder / "q000.parquet").unlink()
    step = -(-len(asked) // files)
    for i in range(files):
        rows = asked[i * step : (i + 1) * step]
        if form == "jsonl":
            (folder / f"q{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"q{i}.parquet")


def settings(folder: Path, target: str = "out", **sections: Any) -> dict[str, Any]:
    sections = {"shards": {"rows": 8}, **sections}
    made = job(folder / "in", folder / target, **sections)
    return {**made, "model": {**made["model"], "engine": {"max_model_len": 100}}}


def undisturbed(folder: Path, **sections: Any) -> list[dict[str, Any]]:
    """What one run with the retry's settings answers."""
    made = settings(folder, "clean", **sections)
    clean = committed({**made, "model": {**made["model"], "engine": {"max_model_len": 4000}}})
    return everything(clean)


def everything(output: Output) -> list[dict[str, Any]]:
    """All rows, failed ones of `errors/` included, without what differs between equal runs."""
    rows = content(output.folder)
    if (output.folder / "errors").exists() and list((output.folder / "errors").iterdir()):
        rows += rows_of(output.folder, "errors").drop_columns(["run_id", "cached_tokens"]).to_pylist()
    return sorted(rows, key=lambda row: (row["row_id"], row["sample_index"]))


def sound(output: Output) -> bool:
    verdict = verify(output.storage, deep=True)
    assert verdict["ok"], verdict["problems"]
    return True


@pytest.fixture
def output(tmp_path: Path) -> Output:
    write_rows(tmp_path / "in")
    return committed(settings(tmp_path))


SEPARATE = {"output": {"failed_rows": "separate"}}
SAMPLES = {"sampling": {"temperature": 1.0, "seed": 3, "n": 3}}


@pytest.mark.parametrize(
    ("sections", "form", "files"),
    [
        ({}, "parquet", 1),
        (SEPARATE, "parquet", 1),
        (SAMPLES, "parquet", 1),
        ({**SEPARATE, **SAMPLES}, "jsonl", 1),
        ({**SEPARATE, "shards": {"rows": 1000}}, "parquet", 5),  # many files in one shard
        ({**SEPARATE, "input": {"filter": "kind != 'sums'"}}, "jsonl", 2),
    ],
)
def test_a_retry_makes_of_the_output_what_one_run_with_its_settings_would_have_made(
    tmp_path: Path, sections: dict[str, Any], form: str, files: int
) -> None:
    write_rows(tmp_path / "in", form, files)
    output = committed(settings(tmp_path, **sections))
    before = {row["row_id"]: row for row in rows_of(output.folder).to_pylist() if not row["error_code"]}
    failed = fold(output.storage, output.plan).totals.rows_failed
    assert failed

    run(output.retry("second", ENOUGH), output.plan.shards)

    assert everything(output) == undisturbed(tmp_path, **sections)
    assert sound(output)
    totals = fold(output.storage, output.plan).totals
    assert set(totals.error_codes) == {"missing_value"}
    answered = failed - totals.rows_failed
    by_run = dict.fromkeys(("first", "second"), 0)
    for row in rows_of(output.folder).to_pylist():
        if not row["error_code"] and row["sample_index"] == 0:
            by_run[row["run_id"]] += 1
    assert by_run == {"first": len(before), "second": answered}


def test_the_footer_tells_who_retried_what_and_times_add_up(output: Output) -> None:
    name = output.plan.shards[0].part_name
    first = read_part(output.storage, name).footer
    work = output.retry("second", ENOUGH)
    run(work, output.plan.shards[:1])
    second = read_part(output.storage, name).footer
    assert second.provenance == first.provenance
    assert second.fingerprint == first.fingerprint == output.plan.fingerprint
    (retried,) = second.retries
    assert work.retry is not None
    assert retried.fingerprint == work.retry.fingerprint != first.fingerprint
    assert (retried.stats.rows_in, retried.stats.rows_ok, retried.stats.rows_failed) == (2, 1, 1)
    assert retried.stats.balanced
    assert retried.provenance.run_id == "second"
    assert retried.provenance.committed_at > first.provenance.committed_at
    assert second.stats.rows_read == first.stats.rows_read == 8
    assert second.stats.latency_s.count == first.stats.latency_s.count + 1 == second.stats.rows_ok == 7
    assert second.stats.generate_s == pytest.approx(first.stats.generate_s + retried.stats.generate_s)
    # A row that failed again bears the latest run's error.
    absent = [row for row in rows_of(output.folder).to_pylist() if row["row_id"].endswith("#4")]
    assert [row["run_id"] for row in absent] == ["second"]


def test_only_rows_with_the_error_codes_asked_for(output: Output) -> None:
    run(output.retry("second", ENOUGH, error_codes=("missing_value",)), output.plan.shards)
    assert fold(output.storage, output.plan).totals.error_codes == {"missing_value": 2, "prompt_too_long": 4}
    run(output.retry("third", ENOUGH, error_codes=("prompt_too_long",)), output.plan.shards)
    assert fold(output.storage, output.plan).totals.error_codes == {"missing_value": 2}
    runs = {
        row["error_code"]: row["run_id"] for row in rows_of(output.folder).to_pylist() if row["error_code"]
    }
    assert runs == {"missing_value": "second"}


def test_user_columns_of_all_kinds_and_the_schema_stay_as_they_are(tmp_path: Path) -> None:
    """Parquet gives some of these types back as others."""
    n = 6
    texts = ["why " * 300 if i in (2, 5) else f"What is {i}?" for i in range(n)]
    table = pa.table(
        {
            "question": texts,
            "seconds": pa.array([datetime(2026, 1, i + 1) for i in range(n)], pa.timestamp("s")),
            "zoned": pa.array([datetime(2026, 1, i + 1) for i in range(n)], pa.timestamp("us", "Asia/Tokyo")),
            "day": pa.array([date(2026, 1, i + 1) for i in range(n)], pa.date64()),
            "price": pa.array([Decimal(f"{i}.50") for i in range(n)], pa.decimal128(10, 2)),
            "kind": pa.array(["a", "b", None, "a", "c", "b"]).dictionary_encode(),
            "tags": pa.array([[f"t{i}"] * (i % 3) for i in range(n)]),
            "nested": pa.array([{"a": i, "b": [{"c": None if i % 2 else "x"}]} for i in range(n)]),
            "large": pa.array([str(i) for i in range(n)], pa.large_string()),
            "blob": pa.array([bytes([i, 255]) for i in range(n)]),
            "nothing": pa.nulls(n),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "q.parquet")
    output = committed(settings(tmp_path, shards={"rows": 3}))
    paths = [output.folder / "data" / shard.part_name for shard in output.plan.shards]
    before = [pq.ParquetFile(path).metadata.metadata[b"ARROW:schema"] for path in paths]
    run(output.retry("second", ENOUGH), output.plan.shards)
    after = [pq.ParquetFile(path).metadata.metadata[b"ARROW:schema"] for path in paths]
    assert len({*before, *after}) == 1
    assert pa.concat_tables(
        [pq.read_table(path, columns=table.column_names) for path in paths]
    ).to_pylist() == (table.to_pylist())
    assert sound(output)


# ── Twice, late, in between ──────────────────────────────────────────────────────────────────────────────────────


def bytes_of(output: Output) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("data", "errors")
        for path in (output.folder / folder).glob("*")
    }


def test_a_merge_that_ray_repeats_finds_its_work_done(output: Output) -> None:
    work = output.retry("second", ENOUGH)
    batches = generated(work, output.plan.shards)
    footers = [merge(work, batch) for batch in batches]
    before = bytes_of(output)
    assert [merge(work, batch) for batch in batches] == footers
    # From the first stage on, and from the second: nothing is read, answered or written again.
    again = generated(work, output.plan.shards)
    assert [json.loads(batch["notes"][0].as_py())["committed"] for batch in again] == [True] * 3
    assert [merge(work, batch) for batch in again] == footers
    assert bytes_of(output) == before


def test_a_zombie_of_a_killed_retry_takes_no_answer_away(output: Output) -> None:
    zombie = output.retry("zombie")  # with the first settings: everything fails again
    late = generated(zombie, output.plan.shards)
    run(output.retry("second", ENOUGH), output.plan.shards)
    before = everything(output)
    for batch in late:
        merge(zombie, batch)
    after = everything(output)
    assert [row["generated_text"] for row in after] == [row["generated_text"] for row in before]
    assert fold(output.storage, output.plan).totals.error_codes == {"missing_value": 2}
    assert sound(output)


def test_a_late_commit_of_the_first_run_changes_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "in")
    output = committed(settings(tmp_path, **SEPARATE))
    first = output.work("first-again")
    prepared = generated(output.work("zombie"), output.plan.shards)
    run(output.retry("second", ENOUGH), output.plan.shards)
    before = rows_of(output.folder).to_pylist()
    footers = [merge(first, batch) for batch in prepared]
    assert rows_of(output.folder).to_pylist() == before
    assert all(footer.retry_by("second") for footer in footers)
    # What it wrote to errors/ before it came second goes at the end of the next run.
    clear_unreferenced_errors(output.storage, output.plan, fold(output.storage, output.plan))
    assert sound(output)
    assert len(rows_of(output.folder, "errors")) == 2


def test_a_row_that_killed_engines_gets_another_chance(output: Output) -> None:
    """What a shard's first life wrote down of it condemns a row there, and says nothing in a retry."""
    shard = output.plan.shards[0]
    poison = f"{shard.spans[0].path}#2"
    first = output.work("first", "errors.max_attempts=1")
    for _ in range(2):
        worker = Attempts(output.storage, "generate", "first")
        latest = worker.history(shard.id, 0).latest
        worker.died(shard.id, worker.another(shard.id, 0, latest, [poison]), "segmentation fault")
    output.storage.delete(f"data/{shard.part_name}")
    run(first, [shard], pass_=1)
    before = fold(output.storage, output.plan).totals
    assert before.error_codes["engine_crash"] == 1

    run(output.retry("second", ENOUGH, error_codes=("engine_crash",)), output.plan.shards)
    (row,) = (row for row in rows_of(output.folder).to_pylist() if row["row_id"] == poison)
    assert (row["error_code"], row["run_id"]) == (None, "second")
    assert row["generated_text"]
    assert fold(output.storage, output.plan).totals.engine_deaths == before.engine_deaths
    assert {info.name.split("/")[2] for info in output.storage.list(".dray/attempts")} == {
        *(shard.id for shard in output.plan.shards),
        "second",
    }


class Killed(Exception):
    pass


class Watched(Storage):
    """A storage that does something before its operation number `at`."""

    def __init__(self, storage: Storage, at: int, then: Callable[[], None]) -> None:
        super().__init__(storage.root)
        self.at, self.then, self.done = at, then, 0

    def _tick(self) -> None:
        self.done += 1
        if self.done == self.at:
            self.then()

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        self._tick()
        return super().read_versioned(name)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        self._tick()
        return super().replace(name, data, version)

    def write(self, name: str, data: bytes) -> None:
        self._tick()
        super().write(name, data)

    def exists(self, name: str) -> bool:
        self._tick()
        return super().exists(name)

    def delete(self, name: str, version: str | None = None) -> bool:
        self._tick()
        return super().delete(name, version)


def kill() -> None:
    raise Killed


#: The storage operations of one merge: read, replace; and: read both, write errors, replace, look for them, delete the old.
STEPS = [*(("inline", at) for at in (1, 2)), *(("separate", at) for at in range(1, 7))]


@pytest.mark.parametrize(("mode", "at"), STEPS)
def test_two_merges_in_any_order_keep_both_answers(tmp_path: Path, mode: str, at: int) -> None:
    """The second one goes through as a whole before operation `at` of the first."""
    write_rows(tmp_path / "in")
    sections: dict[str, Any] = {"output": {"failed_rows": mode}, "shards": {"rows": 24}}
    output = committed(settings(tmp_path, **sections))
    shards = output.plan.shards
    # Each answers what the other cannot: one has room for long prompts, one has words for absent ones.
    one = output.retry("one", ENOUGH, error_codes=("prompt_too_long",))
    other = output.retry("other", "prompt.template={{ question | default('Why?', true) }}")
    (first,), (second,) = generated(one, shards), generated(other, shards)
    watched = Watched(output.storage, at, lambda: merge(other, second) and None)
    merge(one, first, watched)
    assert watched.done >= at
    books = fold(output.storage, output.plan)
    assert books.totals.error_codes == {}
    assert {retried.provenance.run_id for retried in books.parts[0].footer.retries} == {"one", "other"}
    clear_unreferenced_errors(output.storage, output.plan, books)
    assert sound(output)
    answered = {row["row_id"].rpartition("#")[2]: row["run_id"] for row in rows_of(output.folder).to_pylist()}
    assert {int(row) for row, by in answered.items() if by == "one"} == {*LONG}
    assert {int(row) for row, by in answered.items() if by == "other"} == {*ABSENT}


@pytest.mark.parametrize(("mode", "at"), STEPS)
def test_a_merge_killed_anywhere_and_a_retry_after_it(tmp_path: Path, mode: str, at: int) -> None:
    write_rows(tmp_path / "in")
    sections: dict[str, Any] = {"output": {"failed_rows": mode}}
    output = committed(settings(tmp_path, **sections))
    work = output.retry("killed", ENOUGH)
    (batch,) = generated(work, output.plan.shards[:1])
    with pytest.raises(AssertionError, match="Killed"):
        merge(work, batch, Watched(output.storage, at, kill))
    assert sound(output)  # also where it stopped
    run(output.retry("second", ENOUGH), output.plan.shards)
    clear_unreferenced_errors(output.storage, output.plan, fold(output.storage, output.plan))
    assert everything(output) == undisturbed(tmp_path, **sections)
    assert sound(output)


def test_failed_rows_that_a_finishing_driver_cleared_under_a_merge_are_written_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "in")
    output = committed(settings(tmp_path, **SEPARATE))

    def finish() -> None:
        clear_unreferenced_errors(output.storage, output.plan, fold(output.storage, output.plan))

    work = output.retry("zombie", ENOUGH)
    (batch,) = generated(work, output.plan.shards[:1])
    replacing = Watched(output.storage, 4, finish)  # read, read errors, write errors, replace
    footer: Footer = merge(work, batch, replacing)
    assert replacing.done >= 4
    assert footer.errors_object is not None
    assert output.storage.exists(footer.errors_object)
    assert sound(output)


def test_a_part_that_is_gone_is_not_made_by_a_merge(output: Output) -> None:
    work = output.retry("second", ENOUGH)
    (batch,) = generated(work, output.plan.shards[:1])
    name = f"data/{output.plan.shards[0].part_name}"
    output.storage.delete(name)
    with pytest.raises(AssertionError, match=r"is gone; `dray resume` makes it anew"):
        merge(work, batch)
    assert not output.storage.exists(name)


# ── What may be asked ────────────────────────────────────────────────────────────────────────────────────────────


def test_conditions() -> None:
    assert parse_where([]) is None
    assert parse_where(["error_code=engine_crash,request_timeout", "error_code = prompt_error"]) == (
        "engine_crash",
        "request_timeout",
        "prompt_error",
    )


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("error_code=engine_crsh", "unknown error_code 'engine_crsh'; did you mean 'engine_crash'?"),
        ("error_code=", "expected error_code=CODE"),
        ("error_code", "expected error_code=CODE"),
        ("run_id=x", "expected error_code=CODE"),
    ],
)
def test_conditions_that_make_no_sense(condition: str, words: str) -> None:
    with pytest.raises(SpecError, match="--where") as raised:
        parse_where([condition])
    assert words in str(raised.value)
