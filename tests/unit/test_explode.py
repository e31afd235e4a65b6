"""`explode`: against a plain reimplementation, through the stages, in exports, and what is refused before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs import run as run_job
from jobs.books import SUCCESS, fold
from jobs.dataset import Splits, export_dataset
from jobs.dataset_formats import JsonSink, with_columns
from jobs.inspect import report_of, verify
from jobs.preview import preview
from jobs.proposal import propose
from jobs.report import figures
from jobs.report_html import facts_of
from jobs.report_rows import REDACTED, lengths
from pipelines.contracts import RESULT_FIELDS
from pipelines.errors import SpecError
from pipelines.part import Footer, read_part
from pipelines.place import input_rows
from pipelines.shard_stats import ShardStats
from pipelines.step_settings import StepSettings
from pipelines.steps import Steps, settled, with_steps
from pipelines.storage import Storage
from tests.local.runs import content, dray, job
from tests.proof.in_process import Disk, Graph, Life, in_process
from tests.unit.stages import Output, committed
from tests.unit.test_verify import rewritten

# ── Against a plain reimplementation ─────────────────────────────────────────────────────────────────────────────

KINDS = {"list": pa.list_(pa.int64()), "large": pa.large_list(pa.int64()), "struct": pa.list_(pa.int64())}
SAMPLES = st.one_of(
    st.none(), st.just("failed"), st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=12)
)
ROWS = st.lists(st.lists(SAMPLES, min_size=1, max_size=3), max_size=6)


def answers(rows: Sequence[Sequence[Any]], kind: str = "list") -> pa.Table:
    """For each row its samples: a list in `parts` (of the kind `struct`: in its field `in`), null, or `failed`."""
    type_ = pa.struct([("in", KINDS[kind])]) if kind == "struct" else KINDS[kind]
    return pa.Table.from_pylist(
        [
            {
                "parts": None
                if sample in (None, "failed")
                else {"in": sample}
                if kind == "struct"
                else sample,
                "row_id": f"x/y.parquet#{row}",
                "sample_index": index,
                "error_code": "engine_crash" if sample == "failed" else None,
                "run_id": "r",
            }
            for row, samples in enumerate(rows)
            for index, sample in enumerate(samples)
        ],
        schema=pa.schema([pa.field("parts", type_), *RESULT_FIELDS]),
    )


def steps(*settings: dict[str, Any]) -> tuple[StepSettings, ...]:
    return tuple(StepSettings.model_validate(one) for one in settings)


Key = tuple[str, int, int | None]


def elements_of(rows: Sequence[Sequence[Any]], on_empty: str) -> tuple[list[list[Key]], dict[str, int]]:
    """(for each row the (row id, sample, element) of its lists; the counts), by hand."""
    found, counts = [], Counter[str]()
    for row, samples in enumerate(rows):
        made: list[Key] = []
        for index, sample in enumerate(samples):
            if sample == "failed":
                continue
            counts["in"] += 1
            elements = sample or ([None] if on_empty == "null" else [])
            counts["dropped"] += not elements
            counts["added"] += max(len(elements) - 1, 0)
            made += [(f"x/y.parquet#{row}/{k}", index, element) for k, element in enumerate(elements)]
        counts["out"] += len(made)
        found.append(made)
    return found, {"failed": 0, **{name: counts[name] for name in ("in", "added", "dropped", "out")}}


@given(ROWS, st.sampled_from(["drop", "null"]), st.sampled_from([*KINDS]))
def test_each_element_becomes_a_record_in_its_place(rows: list[list[Any]], on_empty: str, kind: str) -> None:
    table = answers(rows, kind)
    settings = steps(
        {"explode": {"column": "parts.in" if kind == "struct" else "parts", "into": "part", "on_empty": on_empty}},
        {"filter": {"where": "part is None or part != 3"}},
    )  # fmt: skip
    records, counts = Steps(settings).run(table)
    written = settled(records)
    made, books = elements_of(rows, on_empty)
    wanted: list[tuple[Any, ...]] = []
    for row, (samples, elements) in enumerate(zip(rows, made, strict=True)):
        wanted += [(*one, None) for one in elements if one[2] != 3]
        if not elements and "failed" in samples:
            wanted.append((f"x/y.parquet#{row}", samples.index("failed"), None, "engine_crash"))
    found = [(r["row_id"], r["sample_index"], r["part"], r["error_code"]) for r in written.to_pylist()]
    assert found == wanted
    assert counts["explode"] == books
    assert written.schema == with_steps(table.schema, settings)


@given(ROWS, st.integers(1, 3))
def test_the_best_elements_of_each_row_of_the_input_are_selected(rows: list[list[Any]], keep: int) -> None:
    records, _ = Steps(
        steps(
            {"explode": {"column": "parts", "into": "part"}},
            {"filter": {"where": "part is not None"}},
            {"select": {"by": "part", "keep": keep}},
        )
    ).run(answers(rows))
    good = settled(records).filter(settled(records)["error_code"].is_null())
    found = [(r["row_id"], r["sample_index"], r["part"]) for r in good.to_pylist()]
    wanted = []
    for elements in elements_of(rows, "drop")[0]:
        numbers = [one for one in elements if one[2] is not None]
        best = sorted(range(len(numbers)), key=lambda place: -numbers[place][2])[:keep]
        wanted += [numbers[place] for place in sorted(best)]
    assert found == wanted


def test_a_list_in_a_list_has_a_place_in_both() -> None:
    lists = pa.array([[["a"], [], ["b", "c"]]], pa.list_(pa.list_(pa.string())))
    records, _ = Steps(
        steps(
            {"explode": {"column": "parts", "into": "part"}},
            {"explode": {"column": "part", "into": "word"}},
        )
    ).run(answers([[None]]).set_column(0, "parts", lists))
    found = [(row["row_id"], row["word"]) for row in settled(records).to_pylist()]
    assert found == [("x/y.parquet#0/0/0", "a"), ("x/y.parquet#0/2/0", "b"), ("x/y.parquet#0/2/1", "c")]


# ── Through the stages ───────────────────────────────────────────────────────────────────────────────────────────

PARTS: tuple[list[str | None] | None, ...] = (
    ["one", "two", "three"],
    [],
    [f"part {k}" for k in range(12)],
    None,
    ["alone"],
    ["same", "same"],
)
#: Rows that have elements, and elements.
FULL, ALL = 4, 18


def write_lists(folder: Path, rows: int = 6) -> list[dict[str, Any]]:
    found = [{"question": f"what is {i}?", "parts": PARTS[i % len(PARTS)]} for i in range(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("question", pa.string()), ("parts", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(found, schema), folder / "lists.parquet", row_group_size=2)
    return found


EXPLODE = {"explode": {"column": "parts", "into": "part"}}
REPLY = {
    "generate": {
        "column": "reply",
        "prompt": {"template": "{{ question }} {{ part }}"},
        "sampling": {"temperature": 0, "max_tokens": 12},
    }
}


def settings(folder: Path, *steps: dict[str, Any], out: str = "out", **sections: Any) -> dict[str, Any]:
    return job(folder / "in", folder / out, **{"shards": {"rows": 4}, "steps": [*steps], **sections})


def footers(output: Output) -> list[Footer]:
    return [read_part(output.storage, shard.part_name).footer for shard in output.plan.shards]


def totals(output: Output) -> ShardStats:
    return sum((footer.stats for footer in footers(output)), ShardStats(shards=0))


@pytest.mark.parametrize("samples", [1, 2])
def test_elements_are_answered_as_rows_of_a_job_of_their_own(tmp_path: Path, samples: int) -> None:
    asked = write_lists(tmp_path / "in")
    sampling = {"n": samples, "temperature": 0.5, "seed": 3, "max_tokens": 24} if samples > 1 else {}
    output = committed(settings(tmp_path, EXPLODE, REPLY, sampling=sampling))
    (tmp_path / "flat").mkdir()
    flat = [{"question": row["question"], "part": part} for row in asked for part in row["parts"] or ()]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "flat" / "flat.parquet")
    prompt, short = {"template": "{{ question }} {{ part }}"}, {"max_tokens": 12}
    alone = committed(job(tmp_path / "flat", tmp_path / "alone", prompt=prompt, sampling=short))
    same = {(row["question"], row["part"]): row["generated_text"] for row in content(alone.folder)}

    rows = content(output.folder)
    assert len(rows) == samples * ALL
    assert {(row["question"], row["part"]): row["reply"] for row in rows} == same
    source = tmp_path / "in" / "lists.parquet"
    assert {(row["row_id"], row["sample_index"], row["part"]) for row in rows} == {
        (f"{source}#{i}/{k}", sample, part)
        for i, row in enumerate(asked)
        for k, part in enumerate(row["parts"] or ())
        for sample in range(samples)
    }
    plain = totals(committed(settings(tmp_path, out="plain", sampling=sampling)))
    stats = totals(output)
    assert (stats.rows_in, stats.rows_added, stats.rows_ok, stats.rows_dropped) == (6, ALL - FULL, ALL, 2)
    assert stats.steps["explode"]["added"] == samples * (ALL - FULL)
    for name in ("prompt_tokens", "completion_tokens"):  # each answer once, however many elements it has
        assert getattr(stats, name) == getattr(plain, name) + stats.steps["generate"][name]
    assert sum(stats.finish_reasons.values()) == 6 * samples
    assert verify(output.storage, deep=True)["problems"] == []
    counted = lengths(output.storage, fold(output.storage, output.plan).parts)
    assert (counted.prompts.total(), counted.answers.total()) == (FULL, FULL * samples)


def test_requests_about_elements_have_ids_and_seeds_of_their_own(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    warm = {"generate": {**REPLY["generate"], "prompt": {"template": "{{ part }}"}}}
    warm["generate"]["sampling"] = {"temperature": 1, "seed": 5, "max_tokens": 12}
    rows = content(committed(settings(tmp_path, EXPLODE, warm)).folder)
    equal = [row["reply"] for row in rows if row["part"] == "same"]
    assert len(equal) == len(set(equal)) == 2


def test_the_books_are_told_everywhere(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, EXPLODE, {"filter": {"where": "part != 'two'"}}))
    told = figures(report_of(output.storage))
    assert told["rows"] == "17 ok, 0 failed, 3 dropped of 20 (6 of the input)"
    assert told["step explode"] == "6 records + 14 added: 18 out, 2 dropped"
    verdict = verify(output.storage, deep=True)
    assert verdict["rows_in"] + verdict["rows_added"] == verdict["rows_ok"] + verdict["rows_dropped"] == 20


def test_a_preview_shows_the_elements_of_each_row(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    seen = preview(load(settings(tmp_path, EXPLODE)), rows=3, generate=True)
    assert [[answer["steps"]["part"] for answer in row["answers"]] for row in seen] == [
        PARTS[0],
        PARTS[1],
        PARTS[2],
    ]


# ── What damage `dray verify` sees ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda rows: rows.slice(1), "holds 14 different rows, its footer counts 17"),
        (lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]), "occur twice"),
        (lambda rows: rows.take([1, 0, *range(2, len(rows))]), "its rows are not in input order"),
        (lambda rows: rows.take([0, 1, 2, 5, 4, 3, *range(6, len(rows))]), "its rows are not in input order"),
        (
            lambda rows: rows.set_column(
                rows.column_names.index("row_id"),
                rows.schema.field("row_id"),
                pa.array([rows["row_id"][0].as_py()[:-2], *rows["row_id"].to_pylist()[1:]]),
            ),
            "1 rows stand beside elements of their own lists",
        ),
    ],
    ids=["missing", "twice", "order", "order by number", "row beside its elements"],
)
def test_damage_to_elements_is_seen(tmp_path: Path, damage: Any, words: str) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, EXPLODE))
    rewritten(output.folder / "data" / output.plan.shards[0].part_name, damage)
    assert words in "\n".join(verify(output.storage, deep=True)["problems"])


def test_an_element_is_a_stranger_where_no_step_makes_any(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path))

    def renamed(rows: pa.Table) -> pa.Table:
        ids = pa.array([f"{row_id}/0" for row_id in rows["row_id"].to_pylist()])
        return rows.set_column(rows.column_names.index("row_id"), rows.schema.field("row_id"), ids)

    rewritten(output.folder / "data" / output.plan.shards[0].part_name, renamed)
    (problem,) = verify(output.storage, deep=True)["problems"]
    assert "4 rows are not its shard's" in problem


# ── What else counts rows, and hides columns ────────────────────────────────────────────────────────────────────


def test_failed_elements_are_held_against_all_elements_not_against_the_inputs_rows() -> None:
    disk = Disk()
    sink = pa.BufferOutputStream()
    rows = [{"question": "x", "parts": ["a"] * 10 + [None]}] * 5
    pq.write_table(pa.Table.from_pylist(rows), sink)
    disk.objects["bucket/in/a.parquet"] = sink.getvalue().to_pybytes()
    failing = {"parse": {"column": "part", "regex": "(?P<letter>.)"}}
    settings = job("sim://bucket/in/", "sim://bucket/out", steps=[EXPLODE, failing], shards={"rows": 1})
    with in_process(Life(disk), Graph(0, in_flight=1, faults=False)):
        report = run_job(load({**settings, "errors": {"max_error_rate": 0.1}}))
    assert (report.stats.rows_failed, report.stats.rows) == (5, 55)
    assert report.state == "complete"


def test_equal_elements_of_all_shards_are_duplicates() -> None:
    disk = Disk()
    sink = pa.BufferOutputStream()
    rows = [{"question": f"{i}", "parts": [f"{i % 2}", "all", f"{i}"]} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), sink)
    disk.objects["bucket/in/a.parquet"] = sink.getvalue().to_pybytes()
    dedup = {"dedup": {"columns": ["part"]}}
    settings = job("sim://bucket/in/", "sim://bucket/out", steps=[EXPLODE, dedup], shards={"rows": 2})
    with in_process(Life(disk), Graph(0, in_flight=1, faults=False)):
        report = run_job(load(settings))
        found = verify(Storage("sim://bucket/out"), deep=True)
    assert (found["problems"], report.stats.rows_added) == ([], 12)
    assert (report.stats.rows_ok, report.stats.rows_dropped) == (len({"all", *map(str, range(6))}), 18 - 7)


def test_the_elements_of_a_hidden_list_are_hidden(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    failing = {"parse": {"column": "part", "regex": "(?P<none>§)"}}
    output = committed(settings(tmp_path, EXPLODE, failing))
    spec = load({**output.settings, "report": {"redact": ["parts"]}}).spec
    shown = facts_of(output.storage, spec).examples["parse_error"]
    assert {example.columns["part"] for example in shown} == {REDACTED}
    assert facts_of(output.storage).examples["parse_error"][0].columns["part"] == "one"


# ── Where else a row's id counts ─────────────────────────────────────────────────────────────────────────────────


def test_the_elements_of_a_row_stay_in_one_split(tmp_path: Path) -> None:
    write_lists(tmp_path / "in", rows=60)
    output = committed(settings(tmp_path, EXPLODE))
    output.storage.write(SUCCESS, b"{}")
    export_dataset(
        output.storage,
        fold(output.storage, output.plan),
        str(tmp_path / "dataset"),
        suffix="jsonl",
        sink=JsonSink,
        prepare=with_columns(["row_id"]),
        splits=Splits.of(["train=0.5", "test=0.5"]),
        file_bytes=1 << 20,
    )
    rows = {
        split: {
            line.rpartition("/")[0]
            for file in (tmp_path / "dataset" / "data").glob(f"{split}-*")
            for line in file.read_text().splitlines()
        }
        for split in ("train", "test")
    }
    assert not rows["train"] & rows["test"]
    assert (len(rows["train"]) > 0, len(rows["train"]) + len(rows["test"])) == (True, 40)


@pytest.mark.slow
def test_chats_are_not_exported_once_for_each_element(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, EXPLODE))
    output.storage.write(SUCCESS, b"{}")
    done = dray("export", "openai", str(output.folder), str(tmp_path / "chats"))
    assert done.returncode == 2
    assert "steps.explode" in done.stderr
    assert "dray export jsonl" in done.stderr


def test_ids_are_read_back() -> None:
    ids = pa.chunked_array([["s3://b/a#1/2/x.parquet#7", "s3://b/a#1/2/x.parquet#7/0/12", "/no/#/5.csv#0/3"]])
    assert input_rows(ids).to_pylist() == [ids[0].as_py(), ids[0].as_py(), "/no/#/5.csv#0"]


# ── Before any engine starts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"column": "question", "into": "x"}, "steps.explode: column: 'question' holds string values, not lists"),
        ({"column": "part", "into": "x"}, "steps.explode: column: there is no column 'part' by then"),
        ({"column": "parts.x", "into": "x"}, "steps.explode: column: there is no column 'parts.x' by then"),
        ({"column": "parts", "into": "question"}, "steps.explode: adds the column 'question', which is there already"),
        ({"column": "parts", "into": "a b"}, "steps.explode.into"),
        ({"column": "parts"}, "steps.explode.into: missing"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_when_planning(tmp_path: Path, step: dict[str, Any], said: str) -> None:
    write_lists(tmp_path / "in")
    with pytest.raises(SpecError) as caught:
        propose(load(settings(tmp_path, {"explode": step})))
    assert said in str(caught.value)


def test_later_steps_know_the_type_of_an_element(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    with pytest.raises(SpecError, match="'part' holds string values, not numbers"):
        propose(load(settings(tmp_path, EXPLODE, {"select": {"by": "part"}})))
    assert propose(load(settings(tmp_path, EXPLODE))).summary["steps"][0]["adds"] == {"part": "string"}
