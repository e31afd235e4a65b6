"""Steps over answers: against a plain reimplementation, through the stages, and what is refused before they run."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load, retry_failed
from jobs.fingerprint import fingerprint
from jobs.inspect import verify
from jobs.proposal import checked_identity, propose
from pipelines.contracts import RESULT_FIELDS
from pipelines.errors import SpecError
from pipelines.step_settings import StepSettings
from pipelines.steps import Steps, settled
from tests.local.runs import job, rows_of, write_questions
from tests.unit.stages import Output, committed, run

ANSWERS = pa.schema([pa.field("question", pa.string()), *RESULT_FIELDS])


def answers(texts: Mapping[str, list[str | None]]) -> pa.Table:
    """Row id → the texts of its samples; None: a row that failed."""
    return pa.Table.from_pylist(
        [
            {
                "question": f"why {row}?",
                "row_id": row,
                "sample_index": index,
                "generated_text": text,
                "error_code": None if text is not None else "engine_crash",
                "error_message": None if text is not None else "it died",
                "run_id": "r",
            }
            for row, samples in texts.items()
            for index, text in enumerate(samples)
        ],
        schema=ANSWERS,
    )


def steps(*settings: dict[str, Any]) -> tuple[StepSettings, ...]:
    return tuple(StepSettings.model_validate(one) for one in settings)


def ran(table: pa.Table, *settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    records, counts = Steps(steps(*settings)).run(table)
    result = settled(records)
    return result.to_pylist(), counts


# ── Against a plain reimplementation ─────────────────────────────────────────────────────────────────────────────

TEXTS = st.one_of(
    st.none(),
    st.builds(lambda n: json.dumps({"score": n}), st.integers(-3, 3)),
    st.builds(lambda n: f"Well {{hm}} ```json\n{json.dumps({'score': n, 'x': {}})}\n```", st.integers(-3, 3)),
    st.sampled_from(
        ['{"score": "3"}', '{"score": true}', '{"score": null}', '{"points": 3}', "", "no", '{"score": 1']
    ),
)
SHARDS = st.lists(st.lists(TEXTS, min_size=1, max_size=4), max_size=8)


def expected(samples: list[str | None], keep: int, on_error: str) -> list[tuple[int, int | None, str | None]]:
    """(sample_index, score, error_code) of one row's records: parse, then `score > 0 or score is null`, then the best."""
    good, failed = [], []
    for index, text in enumerate(samples):
        if text is None:
            failed.append((index, None, "engine_crash"))
            continue
        start = text.find('{"')
        try:
            score = json.JSONDecoder().raw_decode(text[start:])[0]["score"] if start >= 0 else "none"
        except (ValueError, KeyError):
            score = "none"
        if score is None or type(score) is int:
            good.append((index, score, None))
        elif on_error == "fail":
            failed.append((index, None, "parse_error"))
        elif on_error == "null":
            good.append((index, None, None))
    good = [one for one in good if one[1] is None or one[1] > 0]
    best = sorted(good, key=lambda one: (one[1] is None, -(one[1] or 0), one[0]))[:keep]
    return sorted(best) or failed[:1]


@given(SHARDS, st.integers(1, 3), st.sampled_from(["fail", "null", "drop"]))
def test_parse_filter_and_select_are_what_they_say(
    shard: list[list[str | None]], keep: int, on_error: str
) -> None:
    table = answers({f"row-{i}": samples for i, samples in enumerate(shard)})
    rows, counts = ran(
        table,
        {"parse": {"json": {"score": "int64"}, "on_error": on_error}},
        {"filter": {"where": "score > 0 or score is None"}},
        {"select": {"by": "score", "keep": keep}},
    )
    found = [(row["row_id"], row["sample_index"], row["score"], row["error_code"]) for row in rows]
    assert found == [
        (f"row-{i}", *record)
        for i, samples in enumerate(shard)
        for record in expected(samples, keep, on_error)
    ]
    through = len(table) - table["error_code"].drop_null().length()
    for one in counts.values():
        assert one["in"] == through == one["out"] + one["dropped"] + one["failed"]
        through = one["out"]
    assert through == sum(row["error_code"] is None for row in rows)


# ── One kind at a time ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parse", "text", "added"),
    [
        ({"regex": r"Answer: (?P<answer>\d+)", "types": {"answer": "int64"}}, "So.\nAnswer: 42.", {"answer": 42}),
        ({"regex": r"(?P<a>\w+)-(?P<b>\w+)?"}, "x-", {"a": "x", "b": None}),
        ({"xml": {"think": "string", "ok": "bool"}}, "<think> a\nb </think><ok>True</ok>", {"think": "a\nb", "ok": True}),
        ({"json": {"tags": "list<string>", "p": "float64"}}, '{"p": 1, "tags": ["a", null]}', {"tags": ["a", None], "p": 1.0}),
        ({"json": {"day": "date32"}, "column": "question"}, "anything", None),
        ({"regex": r"(?P<n>.*)", "types": {"n": "int64"}}, "four", None),
        ({"xml": {"answer": "string"}}, "<answer>cut of", None),
        ({"json": {"n": "int32"}}, '{"n": 3000000000}', None),
        ({"json": {"n": "int64"}}, '{"n": 1.5}', None),
        ({"json": {"n": "string"}}, '{"n": 1}', None),
        ({"json": {"n": "timestamp[us]"}}, '{"n": "2026-11-25T10:00:00"}', {"n": "2026-11-25 10:00:00"}),
    ],
)  # fmt: skip
def test_a_text_is_read_or_fails(parse: dict[str, Any], text: str, added: dict[str, Any] | None) -> None:
    ((row,), counts) = ran(answers({"a": [text]}), {"parse": parse})
    if added is None:
        assert row["error_code"] == "parse_error"
        assert row["generated_text"] == text
        assert counts == {"parse": {"in": 1, "out": 0, "dropped": 0, "failed": 1}}
    else:
        assert row["error_code"] is None
        assert {name: row[name] if name != "n" else str(row[name]) for name in added} == added


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of the user's own, in the working directory; its name."""
    name = f"checks_{random.getrandbits(40):x}"
    (tmp_path / f"{name}.py").write_text(
        "def judge(record):\n"
        "    if '§boom' in record['generated_text']:\n"
        "        raise ValueError('no booms')\n"
        "    if '§odd' in record['generated_text']:\n"
        "        return {'length': 'long', 'short': True}\n"
        "    if '§less' in record['generated_text']:\n"
        "        return {'length': 3}\n"
        "    n = len(record['generated_text'])\n"
        "    return {'length': n, 'short': n < 40}\n"
    )
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def judged(checks: str) -> dict[str, Any]:
    return {"map": {"function": f"{checks}:judge", "adds": {"length": "int64", "short": "bool"}}}


def test_a_function_fails_its_own_record_only(checks: str, tmp_path: Path) -> None:
    table = answers({"a": ["fine"], "b": ["§boom"], "c": ["§odd"], "d": ["§less", "good"], "e": [None]})
    records, counts = Steps(steps(judged(checks)), [str(tmp_path)]).run(table)
    result = settled(records)
    rows = {(row["row_id"], row["sample_index"]): row for row in result.to_pylist()}
    assert rows.keys() == {("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 0)}
    assert (rows["a", 0]["length"], rows["d", 1]["short"]) == (4, True)
    assert rows["b", 0]["error_message"].endswith("ValueError: no booms")
    assert rows["c", 0]["error_message"] == "length: 'long' is no int64"
    assert rows["c", 0]["short"] is None
    assert rows["e", 0]["error_code"] == "engine_crash"
    assert counts == {"map": {"in": 5, "out": 2, "dropped": 0, "failed": 3}}


def test_a_function_gets_no_text_that_is_no_utf8(checks: str, tmp_path: Path) -> None:
    table = answers({"a": ["fine"], "b": ["fine"]})
    dirty = pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())
    records, _ = Steps(steps(judged(checks)), [str(tmp_path)]).run(table.set_column(0, "question", dirty))
    result = settled(records)
    assert result["error_code"].to_pylist() == [None, "invalid_utf8"]


def test_large_numbers_and_times_in_lists() -> None:
    texts = [json.dumps({"n": n, "at": [f"2026-11-2{n % 10}"]}) for n in (2**60 + 1, 2**60 + 3001)]
    rows, _ = ran(
        answers({"a": list(texts)}),
        {"parse": {"json": {"n": "int64", "at": "list<date32>"}}},
        {"select": {"by": "n"}},
    )
    assert [(row["sample_index"], row["n"], str(row["at"][0])) for row in rows] == [
        (1, 2**60 + 3001, "2026-11-27")
    ]


# ── Through the stages ───────────────────────────────────────────────────────────────────────────────────────────


def settings(tmp_path: Path, checks: str, **sections: Any) -> dict[str, Any]:
    write_questions(tmp_path / "in", rows=30)
    return job(
        tmp_path / "in",
        tmp_path / "out",
        sampling={"temperature": 0.5, "max_tokens": 24, "n": 3, "seed": 1},
        shards={"rows": 7},
        steps=[
            judged(checks),
            {"filter": {"where": "length % 3 == 0"}, "name": "thirds"},
            {"select": {"by": "length", "order": "smallest"}},
        ],
        **sections,
    )


def test_the_books_of_a_job_with_steps_are_in_order(tmp_path: Path, checks: str) -> None:
    plain = settings(tmp_path, checks)
    bare = committed({**plain, "steps": [], "output": {"path": str(tmp_path / "bare")}})
    output = committed(plain)
    found, all_answers = rows_of(output.folder).to_pylist(), rows_of(bare.folder).to_pylist()
    best: dict[str, tuple[int, int]] = {}
    for answer in all_answers:
        n = len(answer["generated_text"])
        if n % 3 == 0 and (answer["row_id"] not in best or best[answer["row_id"]][0] > n):
            best[answer["row_id"]] = (n, answer["sample_index"])
    assert {row["row_id"]: (row["length"], row["sample_index"]) for row in found} == best
    assert len(found) == len(best) < 30

    verdict = verify(output.storage, deep=True)
    stats = [shard.stats for shard in run(output.work("again"), output.plan.shards)]
    assert (verdict["problems"], verdict["rows_in"]) == ([], 30)
    assert verdict["rows_ok"] + verdict["rows_dropped"] == 30
    assert sum(one.rows_dropped for one in stats) == 30 - len(best)
    assert sum(one.completion_tokens for one in stats) == sum(row["completion_tokens"] for row in all_answers)
    assert sum(one.steps["map"]["in"] for one in stats) == 90


def test_rows_that_steps_have_failed_are_retried(tmp_path: Path, checks: str) -> None:
    code = tmp_path / f"{checks}.py"
    whole = code.read_text()
    code.write_text("def judge(record):\n    raise ValueError('not yet')\n")
    output: Output = committed(settings(tmp_path, checks))
    assert set(rows_of(output.folder)["error_code"].to_pylist()) == {"step_error"}
    assert len(rows_of(output.folder)) == 30

    code.write_text(whole)
    sys.modules.pop(checks)
    run(output.retry("second"), output.plan.shards)
    other = committed({**settings(tmp_path, checks), "output": {"path": str(tmp_path / "clean")}})
    names = ["row_id", "sample_index", "generated_text", "length", "short", "error_code"]
    assert rows_of(output.folder).select(names) == rows_of(other.folder).select(names)
    verdict = verify(output.storage, deep=True)
    assert (verdict["problems"], verdict["rows_in"], verdict["rows_failed"]) == ([], 30, 0)


def test_a_retry_may_change_a_step_but_not_its_columns(tmp_path: Path, checks: str) -> None:
    output = committed(settings(tmp_path, checks))
    with pytest.raises(SpecError, match="columns of steps"):
        retry_failed(
            load({**output.settings, "steps": [judged(checks), {"parse": {"regex": "(?P<first>.)"}}]})
        )
    with pytest.raises(SpecError, match="columns of steps"):
        retry_failed(load({**output.settings, "steps": []}))
    retry_failed(load({**output.settings, "steps": [judged(checks)]}))  # no failed row: nothing to do


# ── Before any engine starts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"filter": {"where": "score > 3"}}, "steps.filter.where 'score > 3'"),
        ({"filter": {"where": "length > 'x'"}}, "steps.filter.where"),
        ({"select": {"by": "generated_text"}}, "steps.select: by: 'generated_text' holds string values, not numbers"),
        ({"select": {"by": "scor"}}, "steps.select: by: there is no column 'scor' by then"),
        ({"parse": {"json": {"answer": "string"}}}, "steps.parse: adds the column 'answer', which is there already"),
        ({"parse": {"xml": {"a": "string"}, "column": "length"}}, "steps.parse: column: 'length' holds int64 values"),
        ({"map": {"function": "nowhere_at_all:f", "adds": {"x": "int64"}}}, "steps.map-2.function"),
        ({"parse": {"json": {"a": "int"}}}, "'int' is no type; there are string, bool"),
        ({"parse": {"regex": "(a", "types": {}}}, "not a regular expression"),
        ({"parse": {"regex": "a"}}, "has no named group"),
        ({"parse": {"regex": "(?P<a>.)", "types": {"b": "int64"}}}, "types: b: no group of regex has this name"),
        ({"parse": {"regex": "(?P<a>.)", "xml": {"b": "int64"}}}, "give exactly one of json, regex, xml"),
        ({"name": "both", "filter": {"where": "true"}, "select": {"by": "x"}}, "found filter and select"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_when_planning(
    tmp_path: Path, checks: str, step: dict[str, Any], said: str
) -> None:
    write_questions(tmp_path / "in", rows=3)
    with pytest.raises(SpecError) as caught:
        propose(load(job(tmp_path / "in", tmp_path / "out", steps=[judged(checks), step])))
    assert said in str(caught.value)


def test_steps_and_their_code_make_another_job(tmp_path: Path, checks: str) -> None:
    write_questions(tmp_path / "in", rows=3)

    def printed(*given: dict[str, Any]) -> str:
        return fingerprint(checked_identity(load(job(tmp_path / "in", tmp_path / "out", steps=list(given)))))

    assert printed() == fingerprint(checked_identity(load(job(tmp_path / "in", tmp_path / "out"))))
    one = printed(judged(checks))
    assert one not in (printed(), printed(judged(checks), {"filter": {"where": "short"}}))
    code = tmp_path / f"{checks}.py"
    code.write_text(code.read_text().replace("40", "50"))
    assert printed(judged(checks)) != one
