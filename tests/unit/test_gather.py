"""`gather`: against a plain reimplementation, as the inverse of `explode`, through the stages, and what a retry makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs.books import SUCCESS
from jobs.inspect import report_of, verify
from jobs.preview import preview
from jobs.proposal import propose
from jobs.report import figures
from jobs.report_rows import hidden_columns
from jobs.retry import retry_failed
from pipelines.counting import count_rows
from pipelines.errors import SpecError
from pipelines.steps import Steps, settled, with_steps
from tests.local.runs import content, dray, job, rows_of, write_questions
from tests.unit.stages import committed, run
from tests.unit.test_explode import (
    EXPLODE,
    KINDS,
    PARTS,
    REPLY,
    ROWS,
    answers,
    settings,
    steps,
    totals,
    write_lists,
)
from tests.unit.test_explode_retry import code as code
from tests.unit.test_explode_retry import told, wrote

GATHER = {"gather": {"columns": {"part": "again"}}}
ROW = "x/y.parquet#{}"

# ── Against a plain reimplementation ─────────────────────────────────────────────────────────────────────────────


def gathered_of(rows: Sequence[Sequence[Any]], keeps: Any = lambda element: True) -> list[tuple[Any, ...]]:
    """What stands in the end: (row id, sample, lists of samples and elements, error) of each row, by hand."""
    found: list[tuple[Any, ...]] = []
    for row, samples in enumerate(rows):
        good = [
            (index, one) for index, made in enumerate(samples) if made not in (None, "failed") for one in made
        ]
        good = [(index, one) for index, one in good if keeps(one)]
        if good:
            found.append((ROW.format(row), good[0][0], [one for _, one in good], None))
        elif "failed" in samples:
            found.append((ROW.format(row), samples.index("failed"), None, "engine_crash"))
    return found


@pytest.mark.slow
@given(ROWS, st.sampled_from([*KINDS]))
def test_gather_is_the_inverse_of_explode(rows: list[list[Any]], kind: str) -> None:
    table = answers(rows, kind)
    column = "parts.in" if kind == "struct" else "parts"
    settings = steps({"explode": {"column": column, "into": "part"}}, GATHER)
    records, counts = Steps(settings).run(table)
    written = settled(records)
    found = [(r["row_id"], r["sample_index"], r["again"], r["error_code"]) for r in written.to_pylist()]
    assert found == gathered_of(rows)
    assert written.schema == with_steps(table.schema, settings)
    books = counts["gather"]
    assert books["in"] == counts["explode"]["out"] == books["out"] + books["gathered"]
    assert books["out"] == sum(error is None for *_, error in found)
    assert count_rows(records) == len(rows)  # nothing is added in the end
    # One list of each row: it is the list that was there, and each record what it was.
    alone = [[samples[0]] for samples in rows]
    back = settled(Steps(settings).run(answers(alone, kind))[0])
    before = {row["row_id"]: row for row in answers(alone).to_pylist() if row["parts"] or row["error_code"]}
    assert {row["row_id"]: row["again"] for row in back.to_pylist()} == {
        row_id: row["parts"] for row_id, row in before.items()
    }


@pytest.mark.slow
@given(ROWS)
def test_what_the_steps_between_drop_or_fail_is_in_no_list(rows: list[list[Any]]) -> None:
    table = answers(rows)
    settings = steps(
        {"explode": {"column": "parts", "into": "part"}},
        {"filter": {"where": "part is not None and part != 3"}},
        {"select": {"by": "part", "keep": 2}},
        GATHER,
        {"filter": {"where": "len(again) > 0"}},
    )
    written = settled(Steps(settings).run(table)[0])
    expected = []
    for row_id, _, parts, error in gathered_of(rows, lambda one: one is not None and one != 3):
        best = sorted(range(len(parts or ())), key=lambda k: -parts[k])[:2]
        expected.append((row_id, parts and [parts[k] for k in sorted(best)], error))
    assert [(r["row_id"], r["again"], r["error_code"]) for r in written.to_pylist()] == expected


@given(
    st.lists(st.lists(st.none() | st.just("failed") | st.integers(0, 9), min_size=1, max_size=4), max_size=6)
)
def test_the_samples_of_a_row_become_one_record(rows: list[list[Any]]) -> None:
    # Here a sample is a list of one element, or null.
    table = answers([[one if one in (None, "failed") else [one] for one in samples] for samples in rows])
    gather = {"gather": {"columns": {"parts": "every", "sample_index": "samples"}}}
    records, counts = Steps(steps(gather)).run(table)
    written = settled(records).to_pylist()
    assert [row["row_id"] for row in written] == [ROW.format(row) for row in range(len(rows))]
    for row, samples in zip(written, rows, strict=True):
        good = [index for index, one in enumerate(samples) if one != "failed"]
        assert row["samples"] == (good or None)
        assert row["every"] == ([samples[k] if samples[k] is None else [samples[k]] for k in good] or None)
        # The first good one's own place, or of a failed row the first's.
        assert row["sample_index"] == (good or [0])[0]
        assert row["error_code"] == (None if good else "engine_crash")
    assert counts["gather"]["gathered"] == sum(
        max(sum(one != "failed" for one in samples) - 1, 0) for samples in rows
    )


def test_a_gathered_row_may_be_exploded_and_gathered_again() -> None:
    made = steps(
        {"explode": {"column": "parts", "into": "part"}},
        GATHER,
        {"name": "second", "explode": {"column": "again", "into": "one"}},
        {"filter": {"where": "one != 2"}},
    )
    table = answers([[[1, 2, 3], "failed"], ["failed", "failed"], [[2]], [[4], [5, 6]]])
    written = settled(Steps(made).run(table)[0]).to_pylist()
    assert [(row["row_id"].rpartition("#")[2], row["one"], row["error_code"]) for row in written] == [
        ("0/0", 1, None),
        ("0/2", 3, None),
        ("1", None, "engine_crash"),
        ("3/0", 4, None),
        ("3/1", 5, None),
        ("3/2", 6, None),
    ]
    again = steps({"gather": {"columns": {"one": "all"}}})
    back = settled(Steps([*made, *again]).run(table)[0]).to_pylist()
    assert [(row["row_id"].rpartition("#")[2], row["all"]) for row in back] == [
        ("0", [1, 3]),
        ("1", None),
        ("3", [4, 5, 6]),
    ]


def test_a_dictionary_and_a_structs_field_are_gathered_as_what_they_hold() -> None:
    table = answers([[[1], [2]], [[3], None]])
    words = pa.array(["a", "b", "a", None]).dictionary_encode()
    pairs = pa.array([{"q": "x"}, {"q": None}, None, {"q": "y"}])
    table = table.append_column("word", words).append_column("pair", pairs)
    made = steps({"gather": {"columns": {"word": "words", "pair.q": "questions", "parts": "lists"}}})
    written = settled(Steps(made).run(table)[0])
    assert written["words"].to_pylist() == [["a", "b"], ["a", None]]
    assert written["questions"].to_pylist() == [["x", None], [None, "y"]]
    assert written["lists"].to_pylist() == [[[1], [2]], [[3], None]]
    assert written.schema == with_steps(table.schema, made)


# ── Through the stages ───────────────────────────────────────────────────────────────────────────────────────────


def test_samples_are_kept_as_a_list(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=6)
    several = {"n": 4, "temperature": 1.0, "seed": 1, "max_tokens": 12}
    where = {"sampling": several, "shards": {"rows": 4}}
    gather = {"gather": {"columns": {"generated_text": "texts", "finish_reason": "reasons"}}}
    plain = committed(job(tmp_path / "in", tmp_path / "plain", **where))
    done = committed(job(tmp_path / "in", tmp_path / "out", **where, steps=[gather]))
    samples: dict[str, list[Any]] = {}
    for row in rows_of(plain.folder).to_pylist():
        samples.setdefault(row["row_id"], []).append(row)
    rows = rows_of(done.folder)
    assert rows.schema.field("texts").type == pa.list_(pa.string())
    found = {row["row_id"]: row for row in rows.to_pylist()}
    assert len(found) == len(rows) == len(samples) == 6
    for row_id, row in found.items():
        every = samples[row_id]
        assert row["texts"] == [one["generated_text"] for one in every]
        assert row["reasons"] == [one["finish_reason"] for one in every]
        same = [name for name in every[0] if name != "run_id"]
        assert [row[name] for name in same] == [every[0][name] for name in same]
    one, other = totals(plain), totals(done)
    assert (other.rows_ok, other.samples, one.samples) == (6, 6, 24)
    for name in ("prompt_tokens", "completion_tokens", "finish_reasons"):
        assert getattr(one, name) == getattr(other, name)  # what was spent is what was spent
    assert figures(report_of(done.storage))["step gather"] == "24 records: 6 out, 18 gathered"
    assert verify(done.storage, deep=True)["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2])
def test_a_later_generation_asks_about_the_list(tmp_path: Path, samples: int) -> None:
    write_lists(tmp_path / "in")
    sampling = {"n": samples, "temperature": 0.5, "seed": 3, "max_tokens": 24} if samples > 1 else {}
    gather = {"gather": {"columns": {"part": "again", "reply": "replies"}}}
    about = {
        "name": "whole",
        "generate": {
            "column": "summary",
            "prompt": {"template": "{{ replies | join(', ') }}"},
            "sampling": {"temperature": 0, "max_tokens": 12},
        },
    }
    done = committed(settings(tmp_path, EXPLODE, REPLY, gather, about, sampling=sampling))
    apart = committed(settings(tmp_path, EXPLODE, REPLY, out="apart", sampling=sampling))
    replies: dict[str, list[Any]] = {}
    for row in rows_of(apart.folder).to_pylist():
        row_id, _, place = row["row_id"].rpartition("/")
        replies.setdefault(row_id, []).append((row["sample_index"], int(place), row["reply"]))
    rows = rows_of(done.folder).to_pylist()
    assert [row["again"] for row in rows] == [list(parts) * samples for parts in PARTS if parts]
    assert {row["row_id"]: row["replies"] for row in rows} == {
        row_id: [reply for *_, reply in sorted(every)] for row_id, every in replies.items()
    }
    assert all(row["summary"] for row in rows)
    stats, before = totals(done), totals(apart)
    assert (stats.rows_in, stats.rows_added, stats.rows_ok, stats.rows_dropped) == (6, 0, 4, 2)
    assert stats.finish_reasons == before.finish_reasons
    for name in ("prompt_tokens", "completion_tokens"):  # each answer once, however often it was taken apart
        assert getattr(stats, name) == getattr(before, name) + stats.steps["whole"][name]
    assert verify(done.storage, deep=True)["problems"] == []
    seen = preview(load(settings(tmp_path, EXPLODE, GATHER, out="seen")), rows=3, generate=True)
    assert [[one["steps"]["again"] for one in row["answers"]] for row in seen] == [[PARTS[0]], [], [PARTS[2]]]


@pytest.mark.slow
@pytest.mark.parametrize("failed_rows", ["inline", "separate"])
def test_a_row_fails_when_none_of_its_records_is_good_and_is_mended_whole(
    tmp_path: Path, code: str, failed_rows: str
) -> None:
    write_lists(tmp_path / "in")
    where = {"failed_rows": failed_rows}
    some = "None if i == 4 else ['a', 'b', 'b'] if i == 1 else ['b', 'b'] if i == 2 else ['a', 'c']"
    bad = committed(settings(tmp_path, *wrote(tmp_path, code, some, "['b']"), GATHER, output=where))
    stats = totals(bad)
    assert (stats.rows_in, stats.rows_added, stats.rows_ok, stats.rows_failed) == (6, 0, 4, 2)
    lists = {row["row_id"].rpartition("#")[2]: row["again"] for row in content(bad.folder)}
    if failed_rows == "inline":
        assert told(bad) | {} == {
            **{str(i): ("a", None) for i in (0, 1, 3, 5)},
            "2": ("b", "step_error"),
            "4": (None, "step_error"),
        }
        assert lists["2"] is None
    assert (lists["0"], lists["1"]) == (["a", "c"], ["a"])  # what is missing is that row's failed elements
    assert verify(bad.storage, deep=True)["problems"] == []
    before = {row["row_id"]: row for row in rows_of(bad.folder).to_pylist() if not row["error_code"]}

    wrote(tmp_path, code, "['a', 'b'][: i]", "[]")
    run(bad.retry("second"), bad.plan.shards)
    after = {row["row_id"]: row for row in rows_of(bad.folder).to_pylist()}
    assert {row_id: after[row_id] for row_id in before} == before  # a row with a list stays as it was
    mended = {
        row_id.rpartition("#")[2]: row["again"] for row_id, row in after.items() if row_id not in before
    }
    assert mended == {"2": ["a", "b"], "4": ["a", "b"]}
    verdict = verify(bad.storage, deep=True)
    assert (verdict["problems"], verdict["rows_ok"], verdict["rows_failed"], verdict["rows_added"]) == (
        [],
        6,
        0,
        0,
    )


def test_a_retry_that_gathers_nothing_takes_no_row_away(tmp_path: Path, code: str) -> None:
    write_lists(tmp_path / "in")
    bad = committed(settings(tmp_path, *wrote(tmp_path, code, "['b'] * (i % 2 + 1)", "['b']"), GATHER))
    assert set(told(bad)) == {str(i) for i in range(6)}
    wrote(tmp_path, code, "['b', 'c'] if i < 2 else [] if i == 2 else ['b']", "['b']")
    run(bad.retry("second"), bad.plan.shards)
    verdict = verify(bad.storage, deep=True)
    assert verdict["problems"] == []
    assert (verdict["rows_ok"], verdict["rows_failed"], verdict["rows_dropped"]) == (2, 3, 1)
    assert told(bad)["0"] == ("c", None)


def test_a_retry_may_not_change_which_rows_there_are(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, EXPLODE, GATHER))
    other = {**output.settings, "steps": [{"gather": {"columns": {"parts": "again"}}}, EXPLODE]}
    with pytest.raises(SpecError, match=r"steps\.gather"):
        retry_failed(load(other))


def test_a_gathered_row_keeps_its_failure_from_after_it(tmp_path: Path, code: str) -> None:
    """What failed before is no reason any more: the record stands for its row."""
    write_lists(tmp_path / "in")
    made = wrote(tmp_path, code, "['b', 'a', 'a'][: i + 1]", "['b']")
    long = {"name": "late", "generate": {"column": "x", "prompt": {"template": "{{ part * 9000 }}"}}}
    output = committed(settings(tmp_path, *made, GATHER, long, errors={"max_error_rate": 1.0}))
    rows = {row["row_id"].rpartition("#")[2]: row for row in rows_of(output.folder).to_pylist()}
    assert rows["0"]["error_code"] == "step_error"
    assert {rows[str(i)]["error_code"] for i in range(1, 6)} == {"prompt_too_long"}
    assert rows["2"]["again"] == ["a", "a"]
    gone = committed(
        settings(
            tmp_path,
            *made,
            GATHER,
            {"filter": {"where": "part == 'never'"}},
            out="gone",
            errors={"max_error_rate": 1.0},
        )
    )
    stats = totals(gone)
    assert (stats.rows_failed, stats.rows_dropped, stats.rows_ok) == (1, 5, 0)


@pytest.mark.slow
def test_a_gathered_row_is_one_chat_of_an_export(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, EXPLODE, GATHER))
    output.storage.write(SUCCESS, b"{}")
    done = dray("export", "openai", str(output.folder), str(tmp_path / "chats"))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "chats").rglob("*.jsonl")
    assert len(file.read_text().splitlines()) == sum(bool(parts) for parts in PARTS)


# ── Before any engine starts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"nothing": "x"}, "steps.gather: columns: there is no column 'nothing' by then"),
        ({"parts.x": "x"}, "steps.gather: columns: there is no column 'parts.x' by then"),
        ({"question": "parts"}, "steps.gather: adds the column 'parts', which is there already"),
        ({"question": "a b"}, "steps.gather.columns"),
        ({"question": "x", "parts": "x"}, "two columns would both become 'x'"),
        ({}, "steps.gather.columns"),
        (["question"], "steps.gather.columns"),
    ],
)
def test_a_mistake_is_told_when_planning(tmp_path: Path, columns: Any, said: str) -> None:
    write_lists(tmp_path / "in")
    with pytest.raises(SpecError) as caught:
        propose(load(settings(tmp_path, {"gather": {"columns": columns}})))
    assert said in str(caught.value)


def test_a_plan_knows_the_types_of_the_lists(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    gather = {"gather": {"columns": {"part": "again", "sample_index": "samples"}}}
    planned = propose(load(settings(tmp_path, EXPLODE, gather)))
    assert planned.summary["steps"][1]["adds"] == {
        "again": "list<item: string>",
        "samples": "list<item: int32>",
    }
    with pytest.raises(SpecError, match="'again' holds list<item: string> values, not numbers"):
        propose(load(settings(tmp_path, EXPLODE, gather, {"select": {"by": "again"}})))


def test_the_list_of_a_hidden_column_is_hidden() -> None:
    made = steps({"explode": {"column": "parts.in", "into": "part"}}, GATHER)
    assert hidden_columns(["parts"], {}, made) == {"parts", "part", "again"}
