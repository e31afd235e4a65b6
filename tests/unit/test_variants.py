"""`explode` by `values` and by `columns`: prompt variants and several models as a cross product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs.inspect import verify
from jobs.proposal import propose
from jobs.report_rows import hidden_columns
from pipelines.contracts import RESULT_FIELDS
from pipelines.errors import SpecError
from pipelines.step_settings import StepSettings
from pipelines.steps import Steps, settled, with_steps
from tests.local.runs import TINY, job, rows_of, write_questions
from tests.unit.stages import committed

VARIANTS = {"explode": {"values": ["plain", "careful"], "into": "variant"}}
PROMPT = {"template": "{% if variant == 'careful' %}Think first. {% endif %}{{ question }}"}
OTHER = {"source": str(TINY), "backend": "simulated", "simulated": {"min_tokens": 6}}
GREEDY = {"temperature": 0, "max_tokens": 12}
STACK = {"explode": {"columns": ["small", "large"], "into": "said", "name_into": "model"}}


def asking(column: str, **more: Any) -> dict[str, Any]:
    return {"generate": {"column": column, "prompt": PROMPT, "sampling": GREEDY, **more}}


def steps(*settings: dict[str, Any]) -> tuple[StepSettings, ...]:
    return tuple(StepSettings.model_validate(one) for one in settings)


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 5), st.none() | st.integers(0, 5), st.booleans()), max_size=8
    ),
    st.booleans(),
)
def test_each_column_becomes_a_record(rows: list[tuple[int | None, int | None, bool]], named: bool) -> None:
    table = pa.Table.from_pylist(
        [
            {
                "a": a,
                "b": b,
                "row_id": f"x#{row}",
                "sample_index": 0,
                "run_id": "r",
                "error_code": "engine_crash" if failed else None,
            }
            for row, (a, b, failed) in enumerate(rows)
        ],
        schema=pa.schema([("a", pa.int64()), ("b", pa.int64()), *RESULT_FIELDS]),
    )
    explode = {"columns": ["b", "a"], "into": "c", **({"name_into": "of"} if named else {})}
    settings = steps({"explode": explode}, {"filter": {"where": "c is None or c != 3"}})
    records, counts = Steps(settings).run(table)
    written = settled(records)
    found = [(r["row_id"], r["c"], r.get("of"), r["error_code"]) for r in written.to_pylist()]
    wanted: list[tuple[Any, ...]] = []
    for row, (a, b, failed) in enumerate(rows):
        if failed:
            wanted.append((f"x#{row}", None, None, "engine_crash"))
            continue
        both = [(f"x#{row}/0", b, "b"), (f"x#{row}/1", a, "a")]
        wanted += [(id_, value, name if named else None, None) for id_, value, name in both if value != 3]
    assert found == wanted
    good = sum(not failed for *_, failed in rows)
    assert counts["explode"] == {"in": good, "added": good, "dropped": 0, "failed": 0, "out": 2 * good}
    assert written.schema == with_steps(table.schema, settings)


@pytest.mark.slow
def test_variants_times_models_answer_as_each_pair_alone(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "in", rows=10)
    crossed = [VARIANTS, asking("small"), asking("large", model=OTHER), STACK]
    found = committed(job(tmp_path / "in", tmp_path / "out", prompt=None, shards={"rows": 4}, steps=crossed))
    assert verify(found.storage, deep=True)["problems"] == []
    rows = rows_of(found.folder).to_pylist()
    answers = {(row["row_id"], row["variant"], row["model"]): row["said"] for row in rows}
    assert len(answers) == len(rows) == 4 * len(asked)
    for variant in ("plain", "careful"):
        for model in ("small", "large"):
            alone = job(
                tmp_path / "in",
                tmp_path / f"{variant}-{model}",
                prompt={"template": PROMPT["template"].replace("variant ==", f"'{variant}' ==")},
                model=OTHER if model == "large" else {},
                sampling=GREEDY,
            )
            texts = {
                row["row_id"]: row["generated_text"] for row in rows_of(committed(alone).folder).to_pylist()
            }
            place = f"/{['plain', 'careful'].index(variant)}/{['small', 'large'].index(model)}"
            mine = {id_: text for (id_, v, m), text in answers.items() if (v, m) == (variant, model)}
            assert mine == {id_ + place: text for id_, text in texts.items()}


@pytest.mark.parametrize(
    ("explode", "problem"),
    [
        ({"into": "x"}, "give exactly one of column, values, columns; found none of them"),
        ({"into": "x", "values": ["a"], "column": "c"}, "found column and values"),
        ({"into": "x", "values": ["a", "a"]}, "values: each once; found a, a"),
        ({"into": "x", "values": ["a"], "name_into": "y"}, "name_into: only with columns"),
        ({"into": "x", "columns": ["question"], "name_into": "x"}, "'x' is the column of the elements"),
        ({"into": "x", "values": ["a"], "on_empty": "null"}, "on_empty: only with column"),
        ({"into": "x", "columns": ["question", "nowhere"]}, "columns: there is no column 'nowhere' by then"),
        (
            {"into": "x", "columns": ["question", "prompt_tokens"]},
            "columns: must be of one type; found 'question' string, 'prompt_tokens' int32",
        ),
        ({"into": "question", "values": ["a"]}, "adds the column 'question', which is there already"),
    ],
)
def test_what_cannot_be_is_told_before_it_runs(tmp_path: Path, explode: dict[str, Any], problem: str) -> None:
    write_questions(tmp_path / "in", rows=2)
    with pytest.raises(SpecError, match=problem):
        propose(load(job(tmp_path / "in", tmp_path / "out", steps=[{"explode": explode}])))


def test_elements_of_hidden_columns_are_hidden() -> None:
    assert hidden_columns(["small"], {}, steps(STACK)) == {"small", "said"}
    assert hidden_columns(["question"], {}, steps(STACK, VARIANTS)) == {"question"}
